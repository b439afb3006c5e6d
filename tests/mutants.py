"""Breakages of the core that the tests must notice.

    make mutants                             # all of them
    python tests/mutants.py heads "ADP: "    # those with such names

Each is one change of the source in a copy of the project; it is killed when one of its tests fails.
Not part of `make test`: a mutant takes a quarter of a minute, and two are tried at a time. A change
to the core brings its breakage along.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: tuple  # of pytest


def mutants(file, tests, changes):
    return [Mutant(name, file, old, new, tests) for name, old, new in changes]


ORACLE = "tests/test_reference.py"
BF16 = "tests/test_bf16.py"
OF_ADM = (ORACLE, "-k", "of_adm and sd3 and not after")
OF_SDXL = (ORACLE, "-k", "of_adm and sdxl")
OF_ADP = (ORACLE, "-k", "of_adp and (sd3 or sdxl)")
OF_LORA_ON_8 = "averaged and sd3 and LoRA and 8"
OF_OFFLOAD = "waits and sd3 and adm and offload and not resumed"
OF_LORA = "sd3 and adm and LoRA and not (8 or after or blocks)"

# fmt: off
MUTANTS = [
    *mutants("adm.py", OF_ADM, [
        # Seven of nine that lived before there was a second implementation; two more are below.
        ("heads climb", "learn(loss_d + damping(", "learn(-loss_d - damping("),
        ("D: real against real", "logits([h.detach() for h in maps_fake])", "logits(maps_real)"),
        ("D: real features at t", "features(x_real, s, cond)", "features(x_real, t, cond)"),
        ("t_max ignored", "(cfg.t_min + cfg.dt) * T, cfg.t_max * T", "(cfg.t_min + cfg.dt) * T, T"),
        ("fake score's range of t", "draw.uniform(0, net.", "draw.uniform(300, net."),
        # Steps 1 to 6.
        ("always the last step", "integers(steps))", "integers(steps) * 0 + steps - 1)"),
        ("always the first step", "integers(steps))", "integers(steps) * 0)"),
        ("landing below t_min", "(cfg.t_min + cfg.dt) * T, ", "cfg.t_min * T, "),
        ("no PF-ODE step", "t, t - cfg.dt * T", "t, t - 0 * T"),
        ("PF-ODE step upwards", "t, t - cfg.dt * T", "t, t + cfg.dt * T"),
        ("x_real with gradient of t alone", "pf_ode_step(x_t, out_real, t, s)\n\n",
         "pf_ode_step(x0_hat, out_real, t, s)\n\n"),
        ("fake not frozen", "with frozen(net.fake, disc", "with frozen(disc"),
        ("heads not frozen", "frozen(net.fake, discriminator.heads)", "frozen(net.fake)"),
        ("generator sees x_real", "maps_fake = discriminator.features(x_fake, s",
         "maps_fake = discriminator.features(x_real, s"),
        ("D is shown t of x_fake", "maps_fake = discriminator.features(x_fake, s",
         "maps_fake = discriminator.features(x_fake, t"),
        ("generator climbs", "return -fake.mean()", "return fake.mean()"),
        ("hinge with its sides exchanged", "F.relu(1 - real).mean() + F.relu(1 + fake)",
         "F.relu(1 + real).mean() + F.relu(1 - fake)"),
        ("hinge without its corner", "F.relu(1 - real).mean() + F.relu(1 + fake).mean()",
         "(1 - real).mean() + (1 + fake).mean()"),
        ("fake score learns noise", "net.schedule.to_out(x0, eps, t)",
         "net.schedule.to_out(eps, x0, t)"),
        ("fake score trains the student", "x0 = x0_hat.detach()\n    if", "x0 = x0_hat\n    if"),
        # What the paper has not.
        ("fake's branch without its graph", 'if cfg.fake_gradient == "exact":', "if False:"),
        ("straight through by α_t", "net.schedule.alpha_sigma(s)[0])",
         "net.schedule.alpha_sigma(t)[0])"),
        ("straight through by 1", "per_sample(alpha_s, x0_hat) * (x0", "(x0"),
        ("weight α", "return 1 / alpha_t.clamp", "return alpha_t.clamp"),
        ("damping on real alone", "(x_fake.detach(), logits_fake))",
         "(x_real.detach(), logits_fake))"),
        ("damping's weight", "cfg.damping * damping_loss(", "damping_loss("),
        ("damping's length", "x + cfg.damping_sigma * draw", "x + 2 * cfg.damping_sigma * draw"),
        ("half of the damping", "return 0.5 * ((logits", "return 1.0 * ((logits"),
        ("last is each", 'cfg.fake_samples == "each" or', "True or"),
        ("each is last", 'cfg.fake_samples == "each" or', ""),
        ("last leaves a step out", "net.times[k + 1 :], fresh", "net.times[-1:], fresh"),
        # DMD.
        ("DMD's range depends on Δt", "draw.uniform(cfg.t_min * T,",
         "draw.uniform((cfg.t_min + cfg.dt) * T,"),
        ("DMD's direction", "g = (x0_fake - x0_real)", "g = (x0_real - x0_fake)"),
        ("DMD's normaliser over the batch", ".abs().flatten(1).mean(1).clamp",
         ".abs().mean().expand(len(x0_hat)).clamp"),
        ("DMD's distance to the fake", "per_sample(mean_distance(x0_hat, x0_real)",
         "per_sample(mean_distance(x0_hat, x0_fake)"),
        # The step.
        ("step: straight through by α_t", "x_fake, x0_hat, schedule.alpha_sigma(s)",
         "x_fake, x0_hat, schedule.alpha_sigma(t)"),
        ("step: lands at t", "x_real = schedule.pf_ode_step(x_t, out_real, t, s)\n    x_fake",
         "x_real = schedule.pf_ode_step(x_t, out_real, t, t)\n    x_fake"),
        ("step: branches with gradient", "@torch.no_grad()\ndef both", "def both"),
        ("step: no half", "return 0.5 * apart.mean()", "return apart.mean()"),
        ("weight: κ of σ", "alpha_s - sigma_s * alpha_t / sigma_t", "alpha_s - sigma_s / sigma_t"),
        ("weight: κ alone", "(alpha_s * kappa).clamp", "kappa.clamp"),
        ("weight: DMD's distance left out", "* mean_distance(x0_hat, x0_real))", ")"),
        ("step is DMD", 'return (dmd_round if loss == "dmd" else step_round)',
         "return dmd_round"),
        # The loop.
        ("warm-up one iteration longer", "iteration >= cfg.warmup", "iteration > cfg.warmup"),
        ("student learns in every round", "learns = r == 0 and", "learns = r < 9 and"),
        ("the same samples in every round", "STAGE, iteration, r), samples",
         "STAGE, iteration, 0), samples"),
        ("the same samples in every iteration", "STAGE, iteration, r), samples",
         "STAGE, 0, r), samples"),
        ("heads rest", '("heads", "fake")', '("fake",)'),
        ("exchanged rates", '"fake": cfg.lr_fake, "heads": cfg.lr_heads',
         '"fake": cfg.lr_heads, "heads": cfg.lr_fake'),
        ("average of the fake score", '"student"], cfg.ema)', '"fake"], cfg.ema)'),
        ("resting student trains", "[] if learns else [student]", ""),
        ("loss of one micro-batch", "backward(loss, len(parts))", "backward(loss)"),
    ]),
    *mutants("adm.py", (ORACLE, "-k", "after_adp"), [
        ("student sees the unshown time", "net.student_schedule.shown(t_in)", "t_in"),
    ]),
    *mutants("models.py", (BF16, "-k", "guided and sdxl"), [
        ("bf16: times too", "self.family.call(self.net, x_t, t, cond)",
         "self.family.call(self.net, x_t, t.bfloat16(), cond)"),
    ]),
    *mutants("families/base.py", (BF16, "-k", "start and sdxl"), [
        ("bf16: norms of what is frozen too", "if p.ndim > 1 and", "if"),
    ]),
    *mutants("families/base.py", (BF16, "-k", "start and wan"), [
        ("bf16: Wan's tables too", ' and name.endswith("weight")', ""),
    ]),
    *mutants("families/base.py", ("tests/test_models.py", "-k", "contradicting and wan"), [
        ("a flow of any process", "is_flow = is_euler or said ==", "is_flow = True or said =="),
        ("a flow of other steps", "require(not odd,", "require(True,"),
    ]),
    *mutants("families/wan.py", ("tests/test_models.py", "-k", "wan"), [
        ("Wan: encode_prompt's own tokens", "TOKENS = 512", "TOKENS = 226"),
        ("Wan: latents as the VAE has them", "* std + mean", ""),
        ("Wan: a decoder run again on a later cache", "[None] * at + [*entries]", "feat_cache"),
        ("Wan: one of two experts", "require(second is None", "require(True"),
    ]),
    *mutants("families/wan.py", ("tests/test_models.py", "-k", "recomputes and wan"), [
        ("Wan: a convolution without what it reads", "again(forward, x, feat_cache)",
         "again(forward, x)"),
    ]),
    *mutants("families/__init__.py", ("tests/test_models.py", "-k", "wan_2_2s"), [
        ("Wan 2.2 is taken for 2.1", 'and index.get("expand_timesteps")', "and False"),
    ]),
    *mutants("families/flux.py", ("tests/test_models.py", "-k", "tiny-flux"), [
        ("FLUX: time and guidance are rounded", "(t, T * w, args[-1])", "args"),
        ("FLUX: another model of its class", "require(self.config.guidance_embeds", "require(True"),
        ("FLUX: one stream alone", '"transformer_blocks", "single_', '"transformer_blocks", "'),
    ]),
    *mutants("families/flux.py", ("tests/test_flux.py",), [
        ("FLUX: student at 1", "torch.full_like(t, self.guidance)", "torch.ones_like(t)"),
        ("FLUX: one shift for all sizes", "tokens = shape[-2] * shape[-1]", "tokens = 128 * 128"),
    ]),
    *mutants("ode.py", ("tests/test_flux.py", "-k", "passes or pass"), [
        ("FLUX: CFG on top of what is told", "if is_told:", "if False:"),
    ]),
    *mutants("families/base.py", ("tests/test_models.py", "-k", "contradicting and flux"), [
        ("FLUX: a shift of any kind", 'right = usual and "use_dynamic', 'right = "use_dynamic'),
    ]),
    *mutants("families/export.py", ("tests/test_models.py", "-k", "tiny-flux and export"), [
        ("FLUX: a student called at 1",
         '"guidance_scale": family.guidance if family.embeds_guidance else 1.0',
         '"guidance_scale": 1.0'),
        ("FLUX: σ warped twice", "if not family.even_sigmas:", "if steps:"),
    ]),
    *mutants("adm.py", (BF16, "-k", "twenty and sd3"), [
        ("bf16: a loss too", "F.mse_loss(out.float(), target)",
         "F.mse_loss(out.bfloat16(), target.bfloat16())"),
    ]),
    *mutants("adp.py", OF_ADP, [
        ("ADP: real not noised", "add_noise(x_0, draw.normal(x_0.shape[1:]), t)",
         "add_noise(x_0, 0 * draw.normal(x_0.shape[1:]), 0 * t)"),
        ("ADP: λ_latent ignored", "lambdas = [cfg.lambda_latent]", "lambdas = [1.0]"),
        ("ADP: λ_pixel ignored", "append(cfg.lambda_pixel)", "append(0.15)"),
        ("ADP: cubic reversed", "(1 - (u / T) ** 3) * T", "(u / T) ** 3 * T"),
        ("ADP: velocity's sign", "x_T.float() - x_0.float())", "x_0.float() - x_T.float())"),
        ("ADP: the line's ends", "line.add_noise(x_0, x_T, t)", "line.add_noise(x_T, x_0, t)"),
        ("ADP: heads not frozen", "with frozen(net.heads):", "with frozen():"),
        ("ADP: generator climbs", "return -sum(w * f.mean()", "return sum(w * f.mean()"),
        ("ADP: heads climb", "learn(loss_d)", "learn(-loss_d)"),
        ("ADP: hinge with its sides exchanged", "F.relu(1 - r).mean() + F.relu(1 + f)",
         "F.relu(1 + r).mean() + F.relu(1 - f)"),
        ("ADP: the pixel heads see noise", "net.decoded(clean)", "net.decoded(noised)"),
        ("ADP: regression for an iteration more", "iteration < cfg.mse", "iteration <= cfg.mse"),
        ("ADP: regression's own rate ignored", "cfg.lr_mse if regresses and cfg.lr_mse else ", ""),
        ("ADP: regression trains on adversaries too", 'return log | {"loss_generator": loss_mse}',
         "pass"),
    ]),
    *mutants("adp.py", (ORACLE, "-k", "of_adp and sdxl"), [
        ("ADP: noised on the line", "x_fake = net.schedule.", "x_fake = net.line."),
    ]),
    *mutants("ode.py", OF_ADM, [
        ("guidance from c, not u", "return uncond.float() + w *", "return cond.float() + w *"),
        ("cond and uncond exchanged", "torch.cat([cond[name], uncond[name]])",
         "torch.cat([uncond[name], cond[name]])"),
        ("Euler's step", "return x_t - sigma * out, x_t + alpha * out",
         "return x_t - sigma * out, x_t + out"),
    ]),
    *mutants("ode.py", OF_SDXL, [
        ("ε-prediction", "(x_t - sigma * out) / alpha, out", "(x_t - sigma * out), out"),
        ("σ of VP", "(1 - a_bar).sqrt().float()", "(1 - a_bar).float()"),
    ]),
    *mutants("ode.py", ("tests/test_ode.py",), [
        ("index 1000", "t.floor().clamp(max=self.t_noise)", "t.floor()"),
    ]),
    *mutants("models.py", OF_ADM, [
        ("heads' maximum", "torch.stack(logits).mean(0)", "torch.stack(logits).amax(0)"),
        ("LoRA at half its weight", "lora_alpha=rank", "lora_alpha=rank / 2"),
    ]),
    *mutants("models.py", OF_SDXL, [  # whose maps are more than one position when they are pooled
        ("heads' positions summed", "self.body(h.float()).flatten(2).mean(2)",
         "self.body(h.float()).flatten(2).sum(2)"),
    ]),
    *mutants("models.py", OF_ADP, [
        ("pixels not normalised", "normal = (images - self.mean) / self.std", "normal = images"),
    ]),
    *mutants("families/base.py", OF_ADM, [
        ("one tapped block", "for k in (1, 2, 3)})", "for k in (1, 1, 1)})"),
    ]),
    *mutants("runtime/optimize.py", OF_ADM, [
        ("micro-batches are summed", "(loss / accumulate).backward(one)", "loss.backward(one)"),
        ("an average that forgets", "lerp_(p, 1 - decay)", "lerp_(p, decay)"),
        ("no decay", "weight_decay=0.01", "weight_decay=0.0"),
        ("β1 of its own", "(cfg.beta1, 0.999)", "(0.9, 0.999)"),
    ]),
    *mutants("runtime/optimize.py", (ORACLE,), [
        ("no clipping", "clip_grad_norm_(parameters, clip)", "clip_grad_norm_(parameters, 1e9)"),
    ]),
    *mutants("runtime/optimize.py", ("tests/test_sharding.py", "-k", "not_finite"), [
        ("steps that are not finite", "(~norm.isfinite())", "(norm != norm)"),
    ]),
    *mutants("runtime/optimize.py", ("tests/test_rehearsal.py", "-k", OF_OFFLOAD), [
        ("offload: the host waits", "copy_(moment, non_blocking=True)", "copy_(moment)"),
        ("offload: memory is not pinned", "home.pin_memory() if on_device", "home if on_device"),
    ]),
    *mutants("runtime/optimize.py", ("tests/test_following.py", "-k", "disturb"), [
        ("the average stays in the student", "finally:\n            exchange()",
         "finally:\n            pass"),
    ]),
    *mutants("runtime/sheets.py", ("tests/test_following.py", "-k", "shows_what or below_it"), [
        ("a sheet of the student's first step", "steps)[:-1].to", "steps)[:1].to"),
        ("a sheet's teacher without guidance", "uncond, self.guidance)", "uncond, 1.0)"),
    ]),
    *mutants("runtime/sheets.py", ("tests/test_training.py", "-k", "later and wan"), [
        ("a sheet of CogVideoX's rate", "partial, family.fps)", "partial, 8)"),
    ]),
    *mutants("runtime/configs.py", ("tests/test_following.py", "-k", "tensorboard"), [
        ("an extra that is not there", "not cfg.tensorboard or find_spec", "True or find_spec"),
    ]),
    *mutants("runtime/doctor.py", ("tests/test_doctor.py", "-k", "not run_ends"), [
        ("doctor: the student's rest is judged", '["iteration"] > self.alone', '["iteration"] > 0'),
        ("doctor: few rows are judged", "LEAST = 20", "LEAST = 1"),
        ("doctor: a student that shrinks is healthy", "max(far / start, start / far)",
         "far / start"),
        ("doctor: dead heads are only at chance", "or heads_are_dead(case) or", "or"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_doctor.py", "-k", "ends_with_advice"), [
        ("doctor: never asked", 'and {use}")\n        self.advise()', 'and {use}")'),
    ]),
    *mutants("runtime/ranks.py", ("tests/test_sharding.py",), [
        ("every rank takes the first samples", "self.rank * (batch_size // self.world)", "0"),
        ("gathered parts, not the whole", ".detach().full_tensor()", ".detach().to_local()"),
    ]),
    *mutants("runtime/ranks.py", ("tests/test_sharding.py", "-k", "groups or even"), [
        ("groups: one group's mean", 'mesh_dim_names=("replicate", "shard"))',
         'mesh_dim_names=("replicate", "shard"))["shard"]'),
        ("groups: uneven ones", "world % size == 0", "True"),
        ("groups: whole tensors are written", ".detach().to_local()", ".detach().full_tensor()"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_sharding.py", "-k", "groups or rows"), [
        ("rows: all groups write", "if self.ranks.rank >= self.ranks.sharing:", "if False:"),
    ]),
    *mutants("families/base.py", ("tests/test_sharding.py", "-k", "own_rows"), [
        ("loading: whole tensors", "return files.read(name, own_rows(x))",
         "return own(like(x, files.read(name)))"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_sharding.py", "-k", "own_rows"), [
        ("restoring: whole tensors", 'saved.read(f"weight/{n}", own_rows(p))',
         'own(like(p, saved.read(f"weight/{n}")))'),
    ]),
    *mutants("families/base.py", ("tests/test_models.py", "-k", "other_weights"), [
        ("loading: another shape", "files.shape(name) == x.shape", "True"),
    ]),
    *mutants("runtime/files.py", ("tests/test_sharding.py", "-k", "groups or rows"), [
        ("rows: the first rank's alone", "for part in parts:", "for part in parts[:1]:"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_faults.py", "-k", "flipped or other_tensors"), [
        ("rows: the other rank's hashes", "tensors[rank::world]", "tensors[::world]"),
        ("rows: some may lack a tensor", "if len(kinds) == len(paths) else ()",
         "if kinds else ()"),
    ]),
    *mutants("runtime/script.py", ("tests/test_toy.py", "-k", "reader_that_has_gone"), [
        ("a reader that has gone: a traceback", "except BrokenPipeError:", "except EOFError:"),
        ("a reader that has gone: not before the exit", "sys.stdout.flush()", "pass"),
        ("a reader that has gone: once more",
         "os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())", "pass"),
    ]),
    *mutants("sizing/plan.py", ("tests/test_sizing.py", "-k", "groups"), [
        ("groups: planned as one", "states(parts, cfg, together, live)",
         "states(parts, cfg, world, live)"),
    ]),
    *mutants("sizing/plan.py", ("tests/test_sizing.py", "-k", "neither_fits"), [
        ("the plan: what is not known fits", "return True if self.measured else None",
         "return True"),
        ("the plan: what is not known does not fit", "unknown |= fits is None", "pass"),
    ]),
    *mutants("sizing/plan.py", ("tests/test_sizing.py", "-k", "within_nodes"), [
        ("--fit: over all ranks at once", 'free["shard_ranks"] = NODE', "pass"),
    ]),
    *mutants("sizing/plan.py", ("tests/test_sizing.py", "-k", "sums"), [
        ("the plan forgets earlier gradients", "    more = gradients\n", "    more = 0\n"),
        ("the plan leaves moments on the GPU", "if offload:", "if False:"),
    ]),
    *mutants("sizing/measure.py", ("tests/test_sizing.py", "-k", "sums or depth"), [
        ("the plan is of few blocks", "(blocks - at)", "(then - at)"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_training.py", "-k", "resume or damaged"), [
        ("resume forgets the moments", '{"state": slots,', '{"state": {},'),
        ("resume begins again", "return done\n", "return 0\n"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_sharding.py", "-k", "average"), [
        ("the last weights are exported", 'networks["student"][name].data.copy_(average)', "pass"),
    ]),
    *mutants("data.py", ("tests/test_prompts.py",), [
        ("live: other prompts", "return [self.lines[i] for i", "return [self.lines[i - 1] for i"),
        ("live: nothing for no prompt", "self.floats(teacher.unconditional(self.pipe))",
         "self[[0]]"),
        ("embeddings: room not asked for", "row = numbers * ranks.", "row = 0 * ranks."),
        ("pairs: another text", "same = prompts.sha256 ==", "same = True or prompts.sha256 =="),
        ("pairs: written over", "if path.exists():", "if False:"),
    ]),
    *mutants("runtime/lines.py", ("tests/test_prompts.py",), [
        ("lines: places as objects", 'array("q")', "[]"),
        ("lines: number of the prompt", "enumerate(self.file, 1)", "enumerate(self.file)"),
        ("lines: an old place", "require(self.version == self.written()", "require(True"),
    ]),
    *mutants("runtime/rows.py", ("tests/test_prompts.py",), [
        ("rows: all shards open", "if len(self.files) == OPEN:", "if False:"),
    ]),
    *mutants("families/base.py", ("tests/test_sharding.py", "-k", "ranks_hold and live"), [
        ("live encoders not sharded", "shard(part, layers, mesh)", "shard(part, layers, None)"),
    ]),
    *mutants("models.py", ("tests/test_models.py", "-k", "recomputes"), [
        ("D_τ2: its layers are kept", "layer.forward = partial(again, layer.forward)", "pass"),
    ]),
    *mutants("adp.py", ("tests/test_training.py", "-k", "once_more"), [
        ("memory: SAM's layers are kept", "            pixel_disc.recompute()\n", ""),
    ]),
    *mutants("adm.py", ("tests/test_rehearsal.py", "-k", OF_LORA), [
        ("on a GPU: times stay on the CPU", "timesteps(steps)[:-1].to(ranks.device)",
         "timesteps(steps)[:-1]"),
        ("on a GPU: the host waits for a loss", "    judged = ((x_real,",
         "    loss_d.item()\n    judged = ((x_real,"),
    ]),
    *mutants("runtime/folder.py", ("tests/test_rehearsal.py", "-k", OF_LORA), [
        ("on a GPU: the host waits for a stream", "        asked, *means = self",
         "        torch.cuda.current_stream().synchronize()\n        asked, *means = self"),
    ]),
    *mutants("models.py", ("tests/test_rehearsal.py", "-k", OF_LORA), [
        ("on a GPU: a time in 16 bits", "self.family.call(self.net, x_t, t, cond)",
         "self.family.call(self.net, x_t, t.bfloat16(), cond)"),
        ("on a GPU: what trains in 16 bits", "p.data = p.data.float()",
         "p.data = p.data.bfloat16()"),
        ("on a GPU: a buffer of the heads in 16 bits", "self.heads = nn.ModuleList(heads)",
         "self.heads = nn.ModuleList(heads)\n"
         "        self.heads.register_buffer('scale', torch.ones(1, dtype=torch.bfloat16))"),
    ]),
    *mutants("runtime/ranks.py", ("tests/test_rehearsal.py", "-k", OF_LORA_ON_8), [
        ("on a GPU: gradients averaged in 16 bits", "MixedPrecisionPolicy(dtype, torch.float32,",
         "MixedPrecisionPolicy(dtype, torch.bfloat16,"),
    ]),
    *mutants("runtime/sheets.py", ("tests/test_rehearsal.py", "-k", "nothing_behind and wan"), [
        ("memory: a video decoded in float32", "in_half = is_video and",
         "in_half = not is_video and"),
    ]),
    *mutants("families/base.py", ("tests/test_models.py", "-k", "alone_is_kept"), [
        ("decoder: what a normalisation makes is kept",
         "return partial(again, lambda x: activation(plain(x)))",
         "return lambda x: activation(plain(x))"),
    ]),
    *mutants("families/cogvideox.py", ("tests/test_models.py", "-k", "recomputes"), [
        ("decoder: SiLU left out", "return activation(x * norm.conv_y(z)[0] + norm.conv_b(z)[0])",
         "return x * norm.conv_y(z)[0] + norm.conv_b(z)[0]"),
        ("decoder: every frame as the first", "zq.split(1, 2), strict",
         "zq[:, :, :1].expand_as(zq).split(1, 2), strict"),
    ]),
    *mutants("families/export.py", ("tests/test_models.py", "-k", "export"), [
        ("stock sampler of another shift", "stock_warp(schedule.shift, steps)",
         "stock_warp(1.0, steps)"),
        ("stock sampler without noise", "stochastic_sampling=True", "stochastic_sampling=False"),
        ("a student says a wrong size", '"width": shape[-1] * ', '"width": 2 * shape[-1] * '),
        ("export: the adapter is left out", "return w.float() + b @ a", "return w.float()"),
        ("export: a second base", "return student.family.weights().read",
         "return student.family.network().state_dict().get"),
        ("export: in one file", "max_shard_size=LARGEST_FILE", "max_shard_size=2**60"),
    ]),
    *mutants("tools/sample.py", ("tests/test_sample.py",), [
        ("sample: noise between steps of no seed", "pipe.scheduler, generator=generators)",
         "pipe.scheduler)"),
        ("sample: the same noise again", "pipe.scheduler, generator=generators)",
         "pipe.scheduler, generator=[torch.Generator().manual_seed(seed) for seed in seeds])"),
        ("sample: one seed for all", "cfg.seed + i for i", "cfg.seed for i"),
        ("sample: truncated pictures stay", "endswith(PNG_END)", "endswith(b'')"),
        ("sample: all is made again", " if row_at(out, i) is None]", "]"),
        ("sample: other settings go on",
         'check_same(read_json(path, "images", "count"), manifest, out)', "pass"),
        ("sample: a student's own steps unheard", "    call |= student\n", ""),
        ("sample: another size of a teacher", 'getattr(family_of(index), "call_size", {})', "{}"),
        ("sample: videos of one rate", 'getattr(family_of(index), "fps", FPS)', "FPS"),
        ("sample: arrays for pictures", 'output_type="pil", ', ""),
        ("sample: T5's tokens by the pipeline", "min(usual, t5[0].model_max_length)", "usual"),
        ("sample: any steps of a student", "cfg.steps is None or cfg.steps == own", "True"),
        ("sample: the recipe unheard", 'if "guidance" in recipe:', "if False:"),
        ("sample: ranks leave gaps", "ranks.rank, count, ranks.world", "ranks.rank, count, 3"),
        ("sample: text encoders at random", "require(not info", "require(True or not info"),
        ("sample: weights without storage", "p.is_meta for p", "False for p"),
        ("sample: no words", "len(module.all_special_tokens) + 1", "0"),
        ("sample: any number for VBench", "count % len(prompts) == 0", "True"),
        ("sample: any name for VBench", "possible = fits and", "possible = fits or"),
        ("sample: nothing to correct", 'removesuffix(".png").isdecimal()', 'endswith("json")'),
    ]),
    *mutants("tools/metrics.py", ("tests/test_score.py",), [
        ("score: diversity counts an image with itself", "(n * (n - 1))", "(n * n)"),
        ("score: an image's mean, not a prompt's", "values[prompts == p].mean()", "values.mean()"),
        ("score: distance to another's image", "unit(a) * unit(b)", "unit(a) * unit(b).roll(1, 0)"),
        ("score: Fréchet of means alone", "cov.trace() + cov_x.trace() - 2 * roots", "0"),
        ("score: Fréchet of spreads alone", "(shift + cov.trace()", "(cov.trace()"),
        ("score: a narrow interval", "[2.5, 97.5]", "[25, 75]"),
        ("score: partners apart", "if partners else", "if False else"),
    ]),
    *mutants("tools/score.py", ("tests/test_score.py",), [
        ("score: every image has the first prompt", "torch.stack([x[text] for text in texts])",
         "torch.stack([x[texts[0]] for text in texts])"),
        ("score: PickScore without its scale", "pick.model.logit_scale.exp().item()", "1.0"),
        ("score: other seeds match", "require(one == other, f", "require(True, f"),
        ("score: HPSv2 without its scale", "[100 * float(x)", "[float(x)"),
        ("score: HPSv2 of the first prompt", "s.texts[of_it[0]]", "s.texts[0]"),
        ("score: no words", "len(self.tokenizer) > len(", "len(self.tokenizer) >= len("),
        ("score: half of the scores", '(partial / "table.md")', '(out / "table.md")'),
        ("score: unfinished folders", 'm["complete"] is True', "True"),
        ("score: truncated images", "image.verify()", "pass"),
        ("score: missing weights at random", 'not info["missing_keys"]', "True"),
        ("score: a video's first frame", "[part.mean(0) for part", "[part[0] for part"),
        ("score: real images unheard", "if real else features[teacher]",
         "if False else features[teacher]"),
        ("score: all prompts always", 'if row["prompt"] in set(wanted)', "if True"),
        ("score: written over", "    claim(out)\n", "    out.mkdir(exist_ok=True)\n"),
    ]),
]


# fmt: on


def try_one(mutant, folder):
    """The first test that fails under it, or None."""
    copy = Path(tempfile.mkdtemp(dir=folder)) / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    source = (copy / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"STALE: its text stands {source.count(mutant.old)} times in {mutant.file}"
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *mutant.tests], cwd=copy, capture_output=True, text=True)
    shutil.rmtree(copy.parent)
    if done.returncode == 0:
        return None
    said = done.stdout.splitlines()
    failed = [line.split(" - ")[0] for line in said if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"BROKEN: {(done.stdout + done.stderr)[-500:]}"


def main(wanted):
    chosen = [m for m in MUTANTS if not wanted or any(part in m.name for part in wanted)]
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for m, verdict in zip(chosen, pool.map(lambda m: try_one(m, folder), chosen), strict=True):
            bad += verdict is None or "::" not in verdict
            print(f"{m.name} | {verdict or 'LIVES'}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} killed")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
