"""The loops pinned: an iteration of the real scripts, by their command line, against reference.py.

Each case lets a script do two iterations at high rates, so that student, fake score, teacher and
average are four different networks, and reads the second from the outside: the weights and moments
of both checkpoints, and its row of log.csv. The reference starts from the first checkpoint and the
same random draws, on the stock diffusers networks in float64.

AdamW's first moment tells the gradient: m ← β₁ m + (1 − β₁) g.
"""

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import reference
import torch
import torch.nn.functional as F
import transformers
from conftest import call, read_log
from conftest import saved as tensors_saved
from safetensors.torch import load_file
from torch.func import functional_call

import adm
import adp
import data
import families
import families.base
import families.export
import ode
from families.tiny import build

FAMILIES = ["tiny-sd3", "tiny-sdxl", "tiny-cogvideox-2b", "tiny-cogvideox-5b"]
COMMON = {
    "iterations": 2,
    "checkpoint-every": 1,
    "sample-every": 0,
    "batch-size": 4,
    "head-width": 16,
    "beta1": 0.5,
    "lr-student": 1e-3,
}
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]


# --- Stock networks, in float64 -------------------------------------------------------------------


class Stock:
    """A stock pipeline's denoiser as the reference wants it, and the maps that D_τ taps."""

    def __init__(self, name):
        self.folder = families.load_teacher(name).folder
        self.kind = json.loads((self.folder / "model_index.json").read_text())["_class_name"]
        part, network_class = {
            "StableDiffusionXLPipeline": ("unet", diffusers.UNet2DConditionModel),
            "StableDiffusion3Pipeline": ("transformer", diffusers.SD3Transformer2DModel),
            "CogVideoXPipeline": ("transformer", diffusers.CogVideoXTransformer3DModel),
            "WanPipeline": ("transformer", diffusers.WanTransformer3DModel),
            "FluxPipeline": ("transformer", diffusers.FluxTransformer2DModel),
        }[self.kind]
        self.net = (
            network_class.from_pretrained(self.folder, subfolder=part)
            .double()
            .eval()
            .requires_grad_(False)
        )
        scheduler = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        self.scheduler = getattr(diffusers, scheduler["_class_name"]).from_pretrained(
            self.folder, subfolder="scheduler"
        )
        if self.kind == "StableDiffusionXLPipeline":
            self.tapped = [*self.net.down_blocks, self.net.mid_block]
        else:
            is_wan = self.kind == "WanPipeline"
            blocks = self.net.blocks if is_wan else self.net.transformer_blocks
            if self.kind == "FluxPipeline":
                blocks = [*blocks, *self.net.single_transformer_blocks]
            # After one, two and three quarters of them.
            self.tapped = [blocks[len(blocks) * k // 4 - 1] for k in (1, 2, 3)]
        self.latent_shape = families.load_teacher(name).latent_shape()
        self.maps = {}
        for i, block in enumerate(self.tapped):
            block.register_forward_hook(
                lambda block, args, output, i=i: self.maps.update({i: output})
            )

    def process(self):
        if self.kind in ("StableDiffusion3Pipeline", "WanPipeline", "FluxPipeline"):
            return reference.Process(reference.straight_line, "flow")
        alpha_sigma = reference.variance_preserving(self.scheduler.alphas_cumprod.double())
        return reference.Process(alpha_sigma, self.scheduler.config.prediction_type, t_noise=999)

    def weights(self, own):
        """All of a network's weights; `own` are a role's: all, or LoRA's two factors of some."""
        whole = dict(self.net.named_parameters()) | {
            n: w for n, w in own.items() if "lora_" not in n
        }
        for a in [n for n in own if "lora_A" in n]:
            base = a.split(".lora_A")[0] + ".weight"
            whole[base] = whole[base] + own[a.replace("lora_A", "lora_B")] @ own[a]
        return whole

    def model(self, own, x, t, prompt):
        """The network's own call in its stock pipeline."""
        if self.kind == "FluxPipeline":
            return self.flux(own, x, t, prompt)
        if self.kind == "StableDiffusionXLPipeline":
            side = 2 * x.shape[-1]  # pixels: the tiny VAE halves them
            size = x.new_tensor([side, side, 0, 0, side, side]).expand(len(x), 6)
            args = {"added_cond_kwargs": {"text_embeds": prompt["pooled"], "time_ids": size}}
        elif self.kind == "StableDiffusion3Pipeline":
            args = {"pooled_projections": prompt["pooled"]}
        elif self.kind == "WanPipeline":
            x, args = x.transpose(1, 2), {}
        else:
            args = {"image_rotary_emb": self.rotary(*x.shape[-4:])}
        args |= {
            "encoder_hidden_states": prompt["prompt_embeds"],
            "timestep": t,
            "return_dict": False,
        }
        latents = "sample" if self.kind == "StableDiffusionXLPipeline" else "hidden_states"
        out = functional_call(self.net, self.weights(own), (), args | {latents: x})[0]
        return out.transpose(1, 2) if self.kind == "WanPipeline" else out

    def flux(self, own, x, t, prompt):
        """FLUX's: packed, at an embedded guidance, but for the teacher its pipeline's default."""
        pipeline = diffusers.FluxPipeline
        batch, _, height, width = x.shape
        text = prompt["prompt_embeds"]
        args = {
            "hidden_states": pipeline._pack_latents(x, *x.shape),
            "timestep": t / 1000,
            "guidance": x.new_full((batch,), prompt.get("guidance", 3.5)),
            "pooled_projections": prompt["pooled"],
            "encoder_hidden_states": text,
            "txt_ids": x.new_zeros(text.shape[1], 3),
            "img_ids": pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, x.device, x.dtype
            ),
            "return_dict": False,
        }
        out = functional_call(self.net, self.weights(own), (), args)[0]
        return pipeline._unpack_latents(out, height, width, 1)

    @cache
    def rotary(self, frames, channels, height, width):
        if not self.net.config.use_rotary_positional_embeddings:
            return None
        pipe = SimpleNamespace(vae_scale_factor_spatial=1, transformer=self.net)
        positions = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
        return positions(pipe, height, width, frames, torch.device("cpu"))

    def features(self, phi, x, t, prompt):
        self.model(phi, x, t, prompt)
        return [self.as_map(self.maps[i], x) for i in range(len(self.tapped))]

    def as_map(self, output, x):
        """(B, channels, height, width), for video (B, channels, frames, height, width)."""
        if self.kind == "StableDiffusionXLPipeline":
            return output[0] if isinstance(output, tuple) else output
        patch = self.net.config.patch_size
        if self.kind == "WanPipeline":
            tokens, patch = output, patch[1]  # (B, positions, channels)
        else:
            tokens = output[0 if self.kind == "CogVideoXPipeline" else 1]
        if self.kind == "FluxPipeline":
            patch = 2
        *frames, _, height, width = x.shape[1:]
        return tokens.movedim(1, 2).reshape(len(x), -1, *frames, height // patch, width // patch)

    def images(self, latents, chosen):
        """Decoded, (N, 3, height, width) in about [-1, 1]; of a video two frames."""
        vae, latents = self.vae(), latents.float()  # a video's convolutions in float64 take minutes
        if latents.ndim == 4:
            return vae.decode(
                latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            ).sample.double()
        first = int(chosen[0] * (latents.shape[1] - 1))
        two = latents[:, first : first + 2].transpose(1, 2)
        if self.kind == "WanPipeline":
            mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
            two = (two.movedim(1, -1) * std + mean).movedim(-1, 1)
        else:
            two = two / vae.config.scaling_factor
        video = vae.decode(two).sample.double()  # (B, 3, frames, ...)
        return torch.cat([video[:, :, int(u * video.shape[2])] for u in chosen[1:]])

    @cache
    def vae(self):
        kind = {
            "CogVideoXPipeline": diffusers.AutoencoderKLCogVideoX,
            "WanPipeline": diffusers.AutoencoderKLWan,
        }.get(self.kind, diffusers.AutoencoderKL)
        return kind.from_pretrained(self.folder, subfolder="vae").eval().requires_grad_(False)


def head(tau, h):
    """Logits (B,) of one head on one map: the paper's appendix B, pooled over positions."""
    for i, stride in enumerate((2, 2, 2, 1)):
        kernel, bias = tau[f"body.{3 * i}.weight"], tau[f"body.{3 * i}.bias"]
        if h.ndim == 5:
            h = F.conv3d(h, kernel, bias, stride=(1, stride, stride), padding=1)
        else:
            h = F.conv2d(h, kernel, bias, stride=stride, padding=1)
        groups = len(bias) // 8
        h = F.silu(
            F.group_norm(h, groups, tau[f"body.{3 * i + 1}.weight"], tau[f"body.{3 * i + 1}.bias"])
        )
    return (h.flatten(2).mean(2) @ tau["to_logit.weight"].T + tau["to_logit.bias"])[:, 0]


def mean_of_heads(tau, maps, prefix=""):
    each = [
        {
            n.removeprefix(f"{prefix}{i}."): w
            for n, w in tau.items()
            if n.startswith(f"{prefix}{i}.")
        }
        for i in range(len(maps))
    ]
    return torch.stack([head(weights, h) for weights, h in zip(each, maps, strict=True)]).mean(0)


# --- What a run leaves ----------------------------------------------------------------------------


def saved(folder, iteration, network, names):
    """{name: [w, m, v, n]} of a checkpoint, float64. AdamW numbers them as `names` does."""
    tensors = tensors_saved(folder, iteration, network)
    assert {f"weight/{n}" for n in names} == {key for key in tensors if key.startswith("weight/")}
    slots = {}
    for i, n in enumerate(names):
        w = tensors[f"weight/{n}"].double().requires_grad_()
        m, v = (
            tensors.get(f"adamw/{i}/{slot}", torch.zeros_like(w)).double()
            for slot in ("exp_avg", "exp_avg_sq")
        )
        slots[n] = [w, m, v, int(tensors.get(f"adamw/{i}/step", 0))]
    return slots


def names_in(net, role, lora):
    """A role's parameters as the network lists them: all, or LoRA's A and B of each layer."""
    names = [n for n, _ in net.named_parameters()]
    if not lora:
        return names
    targets = tuple(f".{target}.weight" for target in LORA_TARGETS)
    layers = [n.removesuffix(".weight") for n in names if n.endswith(targets)]
    return [f"{layer}.lora_{factor}.{role}.weight" for layer in layers for factor in "AB"]


def names_in_heads(count, prefix=""):
    layers = [
        "body.0",
        "body.1",
        "body.3",
        "body.4",
        "body.6",
        "body.7",
        "body.9",
        "body.10",
        "to_logit",
    ]
    return [
        f"{prefix}{i}.{layer}.{kind}"
        for i in range(count)
        for layer in layers
        for kind in ("weight", "bias")
    ]


def state_of(run, iteration, names):
    return {network: saved(run.folder, iteration, network, names[network]) for network in names}


def leaves(network):
    return {n: slots[0] for n, slots in network.items()}


def rows(folder, numbers):
    """Rows of a folder of `data.py encode` or `pairs`, float64."""
    size = json.loads((folder / "manifest.json").read_text())["shard_size"]
    picked = [
        {k: x[i % size] for k, x in load_file(folder / f"{i // size:06d}.safetensors").items()}
        for i in numbers
    ]
    return {k: torch.stack([row[k] for row in picked]).double() for k in picked[0]}


def agree(ours, theirs, before, beta1):
    """The gradients that moved `before` to `ours` and `theirs`, and the steps taken."""
    assert all(ours[n][3] == theirs[n][3] for n in before), "another number of steps"
    for what, slot, tolerance in (
        ("gradient", 1, 2e-3),
        ("squared gradient", 2, 4e-3),
        ("step", 0, 3e-2),
    ):
        errors, sizes = {}, {}
        for n in before:
            kept = (
                beta1 ** (theirs[n][3] - before[n][3]) if slot == 1 else 1
            )  # of the moment that was there: β₁ for each step
            ours_moved, theirs_moved = (
                network[n][slot] - kept * before[n][slot] for network in (ours, theirs)
            )
            errors[n], sizes[n] = (
                (ours_moved - theirs_moved).norm().item(),
                theirs_moved.norm().item(),
            )
        error, size = (math.hypot(*norms.values()) for norms in (errors, sizes))
        assert size > 0, f"no {what}"
        assert error < tolerance * size, f"{what}: {error / size:.1e} off"
        if what == "step":  # AdamW makes a step of every gradient, also of rounding errors around 0
            continue
        worst = max(errors, key=lambda n: errors[n] - 10 * tolerance * sizes[n])
        assert errors[worst] < 10 * tolerance * sizes[worst] + tolerance / 10 * size, (
            f"{what} of {worst}"
        )


def agree_on_log(folder, expected):
    row = {name: column[1] for name, column in read_log(folder).items()}
    for name, values in expected.items():
        value = sum(values).item() / len(values)
        tolerance = 2e-3 if name.startswith("grad_norm") else 2e-5
        assert row[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    silent = {"iteration", "seconds", "peak_memory_gb", "skipped"} | expected.keys()
    assert all(row[name] is None for name in row.keys() - silent)


class Finished:
    """A run's folder: its settings as its script resolved them."""

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.cfg = SimpleNamespace(**self.config["config"])
        self.cfg.times = torch.tensor(self.config["student"]["times"]).double()
        self.cfg.student_steps = len(self.cfg.times)
        self.stock = stock(self.cfg.model)
        self.process = self.student_process = self.stock.process()
        if self.config["student"]["prediction"] == "flow" != self.process.prediction:  # after ADP
            self.student_process = reference.Process(
                reference.straight_line,
                "flow",
                999,
                lambda t: t.floor().clamp(max=999),
                fresh=False,
            )

    def check(self, before, state, log, trained):
        """Two iterations' checkpoints and log against the reference's `state` and `log`."""
        agree_on_log(self.folder, log)
        for name in before:
            after = saved(self.folder, 2, name, list(before[name]))
            if name in trained:
                agree(after, state[name], before[name], self.cfg.beta1)
            else:
                assert all(torch.equal(after[n][0], before[name][n][0]) for n in after), (
                    f"{name} should rest"
                )
        if self.cfg.ema:
            one, two = (tensors_saved(self.folder, i, "ema") for i in (1, 2))
            for n, (w, *_) in state["student"].items():
                average = (
                    self.cfg.ema * one[f"weight/{n}"].double() + (1 - self.cfg.ema) * w.detach()
                )
                torch.testing.assert_close(two[f"weight/{n}"].double(), average, atol=2e-4, rtol=0)


@cache
def stock(model):
    return Stock(model)


# --- ADM and DMD ----------------------------------------------------------------------------------


def check_adm(folder):
    """Holds the second iteration of adm.py's run in `folder` against the reference."""
    run = Finished(folder)
    cfg, net = run.cfg, run.stock
    prompts = Path(cfg.prompts)
    cfg.guidance = run.config["guidance"]
    names = {role: names_in(net.net, role, cfg.lora_rank) for role in ("student", "fake")}
    names["heads"] = names_in_heads(len(net.tapped))
    before, state = (state_of(run, 1, names) for _ in range(2))

    def critic(tau, x, t, prompt):
        return mean_of_heads(tau, net.features({}, x, t, prompt))

    log, trained = {}, set()
    for r in range(cfg.ttur):
        k = int(ode.common(cfg.seed, adm.STAGE, 1, r).integers(cfg.student_steps))
        draws = adm_draws(run, r, k, prompts)
        if net.kind == "FluxPipeline":  # the teacher's one pass, at that guidance
            draws.no_prompt = {**draws.prompt, "guidance": run.config["guidance"]}
            cfg.guidance = 0
        theta, psi, tau = (leaves(state[name]) for name in ("student", "fake", "heads"))
        out = reference.adm(
            net.model,
            critic,
            theta,
            {},
            psi,
            tau,
            run.process,
            run.student_process,
            cfg,
            draws,
            k,
            r == 0,
        )
        losses = {"fake": "loss_fake"}
        if cfg.loss == "adm":
            losses["heads"] = "descended_by_heads"
        if r == 0 and cfg.warmup < 2:
            losses["student"] = "loss_generator"
        for name, loss in losses.items():
            rate = getattr(cfg, f"lr_{name}")
            out[f"grad_norm_{name}"] = reference.descend(state[name], out[loss], rate, cfg)
        trained |= set(losses)
        not_logged = ["descended_by_heads"] + (
            ["loss_generator", "dmd_loss", "x0_mean", "x0_std"] if r else []
        )
        for name in out.keys() - not_logged:
            log.setdefault(name, []).append(out[name])
    run.check(before, state, log, trained)


def adm_draws(run, r, k, prompts):
    """The random numbers of round r of iteration 2, in the order of a generator."""
    cfg, d = run.cfg, SimpleNamespace(renoise={})
    draw = ode.Draw((cfg.seed, adm.STAGE, 1, r), range(cfg.batch_size))

    def normal():
        return draw.normal(run.stock.latent_shape).double()

    count = json.loads((prompts / "manifest.json").read_text())["count"]
    d.prompt = rows(prompts, draw.integers(count))
    d.no_prompt = rows(prompts / "unconditional", [0] * cfg.batch_size)
    d.x_T = normal()
    if run.student_process.fresh:
        d.renoise = {i: normal() for i in range(k)}
    if cfg.loss == "adm" or r == 0:
        d.u, d.eps = draw.uniform(0, 1).double(), normal()
    if cfg.loss == "adm" and cfg.damping:
        d.damping_real, d.damping_fake = normal(), normal()
    if run.student_process.fresh and cfg.fake_samples == "last":
        d.renoise |= {i: normal() for i in range(k, cfg.student_steps - 1)}
    d.u_fake, d.eps_fake = draw.uniform(0, 1).double(), normal()
    return d


def seed_that_trains(k, steps):
    """The least seed with which the first round of iteration 2 trains step k of `steps`."""
    return next(s for s in range(999) if ode.common(s, adm.STAGE, 1, 0).integers(steps) == k)


STRONG = {"dt": 0.25, "lr-heads": 0.5}  # D's logits leave [-1, 1]
ADM = {  # every step k of four, and every value of every setting
    "k=0": {"seed": seed_that_trains(0, 4)},
    "k=1": {
        "seed": seed_that_trains(1, 4),
        "guidance": 1,
        "damping": 0.1,
        "fake-gradient": "straight-through",
        "fake-samples": "last",
        "accumulate": 4,
        "ema": 0.8,
    },
    "k=2": {
        "seed": seed_that_trains(2, 4),
        "ttur": 2,
        "gen-weight": "1/alpha",
        "fake-samples": "last",
        "warmup": 1,
        **STRONG,
    },
    "k=3": {
        "seed": seed_that_trains(3, 4),
        "lora-rank": 2,
        "accumulate": 2,
        "gradient-checkpointing": True,
        "damping": 0.5,
        **STRONG,
    },
    "one step": {
        "student-steps": 1,
        "fake-gradient": "straight-through",
        "gen-weight": "dmd",
        "t-min": 0.3,
        "t-max": 0.6,
        "gradient-checkpointing": True,
    },
    "dmd": {
        "loss": "dmd",
        "seed": seed_that_trains(1, 4),
        "ttur": 2,
        "fake-samples": "last",
        "dt": 0.25,
        "ema": 0.8,
    },
    "step": {
        "loss": "step",
        "seed": seed_that_trains(1, 4),
        "ttur": 2,
        "fake-samples": "last",
        "gen-weight": "dmd",
        "dt": 0.25,
    },
}
MORE_ADM = {  # for one of them
    "step lora": {"loss": "step", "student-steps": 1, "lora-rank": 2, "accumulate": 2, "dt": 0.1},
    "step, warm-up": {"loss": "step", "warmup": 2, "gen-weight": "1/alpha"},
    "warm-up": {"warmup": 2, "ttur": 3, "lora-rank": 2, "damping": 0.1, "clip": 1e-3, "dt": 0.25},
    "dmd lora": {
        "loss": "dmd",
        "student-steps": 1,
        "lora-rank": 2,
        "t-min": 0.3,
        "t-max": 0.6,
        "guidance": 1,
        "accumulate": 4,
    },
}
ADM_CASES = [
    *((case, model) for case in ADM for model in FAMILIES[:2]),
    # One class and one prediction, which differ in positions and in a schedule's numbers: in turn.
    *((case, FAMILIES[2 + i % 2]) for i, case in enumerate(ADM)),
    *((case, "tiny-sd3") for case in MORE_ADM),
    *((case, model) for case in ("k=0", "k=3") for model in ("tiny-wan", "tiny-flux")),
]


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", value]
    return flags


@pytest.mark.parametrize("case, model", ADM_CASES)
def test_an_iteration_of_adm(case, model, encoded, tmp_path):
    fixed = {"lr-fake": 2e-3, "lr-heads": 3e-3, "student-steps": 4}
    settings = {
        "model": model,
        "prompts": encoded[model],
        "out": tmp_path / "out",
        **COMMON,
        **fixed,
        **(ADM | MORE_ADM)[case],
    }
    call(adm.main, adm.Config, *as_flags(settings))
    check_adm(tmp_path / "out")


# --- ADP ------------------------------------------------------------------------------------------


def check_adp(folder):
    """Holds the second iteration of adp.py's run in `folder` against the reference."""
    run = Finished(folder)
    cfg, net = run.cfg, run.stock
    pairs = Path(cfg.pairs)
    names = {
        "student": names_in(net.net, "student", cfg.lora_rank),
        "heads": names_in_heads(len(net.tapped), "0."),
    }
    if cfg.pixel:
        names["heads"] += names_in_heads(4, "1.")
    before, state = (state_of(run, 1, names) for _ in range(2))

    manifest = json.loads((pairs / "manifest.json").read_text())
    draw, d = ode.Draw((cfg.seed, adp.STAGE, 1), range(cfg.batch_size)), SimpleNamespace()
    pair = rows(pairs, draw.integers(manifest["count"]))
    d.x_T, d.x_0, d.prompt = (
        pair["x_T"],
        pair["x_0"],
        rows(pairs / manifest["prompts"], pair["prompt"].long().tolist()),
    )
    d.u = draw.uniform(0, 1).double()
    regresses = cfg.loss == "mse" or cfg.mse_iterations == 2
    if not regresses:
        d.u_noise = draw.uniform(0, 1).double()
        d.eps_fake, d.eps_real = (draw.normal(d.x_0.shape[1:]).double() for _ in range(2))
    chosen = ode.common(cfg.seed, adp.STAGE, 1).random(3)

    def latent(tau, x, t, prompt):
        return mean_of_heads(tau, net.features({}, x, t, prompt), "0.")

    def pixel(tau, x, t, prompt):
        return mean_of_heads(tau, vision_maps(cfg.pixel_backbone, net.images(x, chosen)), "1.")

    critics = [(cfg.lambda_latent, latent, True, "d_accuracy")]
    if cfg.pixel:
        critics.append((cfg.lambda_pixel, pixel, False, "d_accuracy_pixel"))
    out = reference.adp(
        net.model,
        critics,
        leaves(state["student"]),
        leaves(state["heads"]),
        run.process,
        run.student_process,
        cfg,
        d,
        regresses,
    )
    rate = cfg.lr_mse if regresses and cfg.lr_mse else cfg.lr_student
    out["grad_norm_student"] = reference.descend(state["student"], out["loss_generator"], rate, cfg)
    if not regresses:
        out["grad_norm_heads"] = reference.descend(
            state["heads"], out["descended_by_heads"], cfg.lr_heads, cfg
        )
    log = {name: [value] for name, value in out.items() if name != "descended_by_heads"}
    run.check(before, state, log, {"student"} if regresses else {"student", "heads"})


@cache
def vision(name):
    kind = {"tiny-sam": transformers.SamVisionModel, "tiny-dinov2": transformers.Dinov2Model}[name]
    return kind.from_pretrained(build(name)).double().eval().requires_grad_(False)


def vision_maps(name, images):
    """A vision transformer's maps after each quarter of its layers, of images in [−1, 1]."""
    net = vision(name)
    side = net.config.image_size
    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True) / 2 + 0.5
    mean, std = (
        images.new_tensor(c).view(3, 1, 1) for c in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )  # ImageNet's
    layers = net((images - mean) / std, output_hidden_states=True).hidden_states
    maps = [layers[i] for i in (1, 2, 3, 4)]  # of four
    if name == "tiny-dinov2":
        n = side // net.config.patch_size
        maps = [h[:, 1:].reshape(len(h), n, n, -1) for h in maps]  # without the class token
    return [h.permute(0, 3, 1, 2) for h in maps]


ADP = {
    "regression": {"mse-iterations": 2, "lr-mse": 2e-3, "ema": 0.8},
    "adversaries": {
        "mse-iterations": 0,
        "lr-mse": 5e-3,
        "lambda-latent": 0.6,
        "lambda-pixel": 0.3,
        "gradient-checkpointing": True,
    },
    "from regression": {
        "mse-iterations": 1,
        "pixel": False,
        "schedule": "uniform",
        "accumulate": 4,
        "ema": 0.8,
    },
    "dinov2 lora": {
        "mse-iterations": 0,
        "pixel-backbone": "tiny-dinov2",
        "lora-rank": 2,
        "accumulate": 2,
        "lr-heads": 0.05,
    },
    "mse lora": {
        "loss": "mse",
        "schedule": "uniform",
        "lora-rank": 2,
        "accumulate": 4,
        "pixel": False,
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, encoded):
    folders = {}
    for model in (*FAMILIES, "tiny-wan", "tiny-flux"):
        folders[model] = tmp_path_factory.mktemp("pairs") / model
        call(
            data.pairs,
            data.PairsConfig,
            "--model",
            model,
            "--prompts",
            encoded[model],
            "--out",
            folders[model],
            "--count",
            6,
            "--steps",
            1,
            "--guidance",
            1,
        )
    return folders


@pytest.mark.parametrize(
    "case, model",
    [
        *((case, model) for case in ADP for model in ("tiny-sd3", "tiny-sdxl")),
        *(("regression", model) for model in FAMILIES[2:]),
        ("adversaries", "tiny-cogvideox-2b"),
        ("from regression", "tiny-cogvideox-5b"),
        ("dinov2 lora", "tiny-cogvideox-5b"),
        ("adversaries", "tiny-wan"),
        ("adversaries", "tiny-flux"),
    ],
)
def test_an_iteration_of_adp(case, model, pairs, tmp_path):
    settings = {
        "model": model,
        "pairs": pairs[model],
        "out": tmp_path / "out",
        **COMMON,
        "lr-heads": 3e-3,
        **ADP[case],
    }
    if "cogvideox" in model:
        settings |= {
            "batch-size": 2,
            "accumulate": min(2, settings.get("accumulate", 1)),
        }  # its decoder takes seconds
    call(adp.main, adp.Config, *as_flags(settings))
    check_adp(tmp_path / "out")


@pytest.mark.parametrize("model", FAMILIES[1:])
def test_an_iteration_of_adm_after_adp(model, pairs, encoded, tmp_path):
    """A variance-preserving teacher's student then walks on a straight line and keeps its noise."""
    settings = {"model": model, **COMMON}
    call(
        adp.main,
        adp.Config,
        *as_flags(
            {
                **settings,
                "pairs": pairs[model],
                "out": tmp_path / "adp",
                "loss": "mse",
                "pixel": False,
            }
        ),
    )
    more = {
        "init": tmp_path / "adp",
        "student-steps": 4,
        "seed": seed_that_trains(2, 4),
        "fake-samples": "last",
        "lr-fake": 2e-3,
    }
    call(
        adm.main,
        adm.Config,
        *as_flags({**settings, "prompts": encoded[model], "out": tmp_path / "adm", **more}),
    )
    check_adm(tmp_path / "adm")
