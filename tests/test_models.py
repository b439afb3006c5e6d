"""models.py on tiny teachers of every family: opening, calling, tapping, heads, gradients, export."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.testing import assert_close

import families
import families.base
import families.export
import models
import ode
from families import load_teacher
from runtime.settings import BadInput
from families.tiny import build

FAMILIES = families.TINY
TIMES = torch.tensor([999.0, 437.5])


def latents(family, n=2, seed=0):
    return torch.randn(n, *family.latent_shape(), generator=torch.Generator().manual_seed(seed))


# --- Opening ---------------------------------------------------------------------------------------------------------

def edited(tmp_path, name, file, **changes):
    """A copy of a tiny pipeline folder with one json file changed."""
    folder = tmp_path / name
    shutil.copytree(build(name), folder)
    content = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))
    return folder


@pytest.mark.parametrize("name, prediction, shape, guidance, steps", [
    ("tiny-sdxl", "epsilon", (4, 32, 32), 5.0, 1), ("tiny-sd3", "flow", (16, 16, 16), 7.0, 4),
    ("tiny-cogvideox-2b", "v_prediction", (3, 16, 16, 16), 6.0, 4), ("tiny-cogvideox-5b", "v_prediction", (3, 16, 16, 16), 6.0, 4)])
def test_families(teachers, tmp_path, name, prediction, shape, guidance, steps):
    family = teachers[name]
    assert (family.schedule.prediction, family.latent_shape(), family.guidance, family.student_steps) == (prediction, shape, guidance, steps)
    local = load_teacher(shutil.copytree(build(name), tmp_path / "local"))  # any local folder of the same classes
    assert type(local) is type(family) and local.weights_sha256 == family.weights_sha256


def test_tiny_teachers_are_the_same_every_time_and_differ(teachers):
    hashes = {name: family.weights_sha256 for name, family in teachers.items()}
    assert len(set(hashes.values())) == 4
    before = torch.random.get_rng_state()
    build.cache_clear()
    assert load_teacher("tiny-sd3").weights_sha256 == hashes["tiny-sd3"]
    assert torch.equal(before, torch.random.get_rng_state())  # a run's own random numbers are untouched


@pytest.mark.parametrize("name, file, changes, says", [
    ("tiny-sdxl", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts epsilon"),
    ("tiny-sdxl", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "terminal SNR"),
    ("tiny-sdxl", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "1000 time steps"),
    ("tiny-sdxl", "model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "SDXL needs a VP"),
    ("tiny-sd3", "model_index.json", {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "predicts a flow"),
    ("tiny-sd3", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ("tiny-sd3", "scheduler/scheduler_config.json", {"stochastic_sampling": True}, "stochastic_sampling"),
    ("tiny-cogvideox-2b", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "predicts v_prediction"),
    ("tiny-cogvideox-5b", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": False}, "terminal SNR"),
    ("tiny-sd3", "model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
    ("tiny-sd3", "model_index.json", {"_class_name": "gone"}, "no complete diffusers pipeline folder"),
    ("tiny-sdxl", "scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "no complete diffusers pipeline folder"),
    ("tiny-cogvideox-2b", "transformer/config.json", {"patch_size_t": 2, "patch_bias": False}, "pipeline folder|not supported"),
    ("tiny-sd3", "model_index.json", {"scheduler": "gone"}, "no complete diffusers pipeline folder"),
    ("tiny-sd3", "model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}, "no complete diffusers pipeline folder"),
])
def test_contradicting_folders_are_refused(tmp_path, name, file, changes, says):
    with pytest.raises(BadInput, match=says):
        load_teacher(edited(tmp_path, name, file, **changes))


def test_missing_and_damaged_weights_are_refused(tmp_path):
    folder = shutil.copytree(build("tiny-sd3"), tmp_path / "sd3")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cannot load its transformer"):
        models.load_denoiser(load_teacher(folder))
    weights.unlink()
    with pytest.raises(BadInput, match="no weights"):
        load_teacher(folder)
    (folder / "model_index.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="no complete"):
        load_teacher(folder)


def test_scheduler_settings_are_read_not_guessed(tmp_path):
    assert load_teacher(edited(tmp_path, "tiny-sd3", "scheduler/scheduler_config.json", shift=2.0)).schedule.shift == 2.0
    shifted = load_teacher(edited(tmp_path, "tiny-cogvideox-2b", "scheduler/scheduler_config.json", snr_shift_scale=1.0))
    stock = load_teacher("tiny-cogvideox-5b").schedule
    assert_close(shifted.schedule.alphas_cumprod, stock.alphas_cumprod)


def test_unknown_models_and_an_unreachable_hub(tmp_path):
    with pytest.raises(BadInput, match="unknown model 'sd9'"):
        load_teacher("sd9")
    with pytest.raises(BadInput, match="no complete diffusers pipeline folder"):
        load_teacher(tmp_path)
    for name in families.HUB:
        with pytest.raises(BadInput, match="cannot fetch.*--model tiny-") as e:
            load_teacher(name)
        assert str(e.value).split("--model ")[1].split()[0] in families.TINY and "\n" not in str(e.value)


@pytest.mark.parametrize("name, resolution, frames, says", [
    ("tiny-sdxl", "60", None, "multiples of 8"), ("tiny-sdxl", "32", None, "at least 8x8"), ("tiny-sd3", "16", None, "at least 8x8"),
    ("tiny-sd3", "96", None, "at most 64 pixels"), ("tiny-sd3", "33", None, "multiples of 4"), ("tiny-sd3", "big", None, "pixels"),
    ("tiny-sd3", "-32", None, "pixels"), ("tiny-sd3", "32x32x32", None, "pixels"), ("tiny-sd3", "0", None, "at least 8x8"),
    ("tiny-sd3", None, 9, "video"), ("tiny-cogvideox-2b", None, 8, "8n \\+ 1 frames"), ("tiny-cogvideox-2b", None, 5, "8n \\+ 1 frames"), ("tiny-cogvideox-2b", None, 1, "frames"),
    ("tiny-cogvideox-2b", "100", None, "multiples of 16"), ("tiny-cogvideox-2b", "64", None, "at least 8x8")])
def test_sizes_out_of_reach(teachers, name, resolution, frames, says):
    with pytest.raises(BadInput, match=says):
        teachers[name].latent_shape(resolution, frames)


@pytest.mark.parametrize("name, resolution, frames, shape", [
    ("tiny-sdxl", "64x96", None, (4, 32, 48)), ("tiny-sd3", "64", None, (16, 32, 32)), ("tiny-sd3", "32x48", None, (16, 16, 24)),
    ("tiny-cogvideox-2b", "128x144", 17, (5, 16, 16, 18)), ("tiny-cogvideox-5b", "144x128", 9, (3, 16, 18, 16))])
def test_other_sizes_run_through_the_discriminator(teachers, conditionings, name, resolution, frames, shape):
    family = teachers[name]
    assert family.latent_shape(resolution, frames) == shape
    discriminator = models.LatentDiscriminator(models.load_denoiser(family), width=32)
    maps = discriminator.features(torch.randn(2, *shape), TIMES, conditionings[name])
    assert discriminator.logits(maps).shape == (2,)


# --- Conditioning ----------------------------------------------------------------------------------------------------

def test_unconditional_inputs(teachers):
    for name, family in teachers.items():
        pipe = family.text_pipeline()
        none, empty = family.unconditional(pipe), family.encode(pipe, [""])
        zeros = all((c == 0).all() for c in none.values())
        assert zeros if name == "tiny-sdxl" else all(torch.equal(none[k], empty[k]) for k in none) and not zeros


# --- The denoiser ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
def test_call_is_the_stock_pipelines(teachers, name):
    """One guided step of the stock pipeline from given noise equals ours: conditioning, time ids, rotary, time, CFG."""
    family = teachers[name]
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    pipe.set_progress_bar_config(disable=True)
    prompts, x = ["a red fox", "two dogs"], latents(family)
    stock, seen = type(family.meta_net).forward, {}

    def spy(net, *args, **kwargs):
        seen["t"] = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen["in"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["out"] = stock(net, *args, **kwargs)[0]
        return (seen["out"],)
    net = getattr(pipe, family.net_name)
    net.forward = spy.__get__(net)
    with torch.no_grad():
        pipe(prompts, num_inference_steps=1, guidance_scale=3.0, latents=x, output_type="latent")
        text = family.text_pipeline()
        cond, none = family.encode(text, prompts), family.unconditional(text)
        both = {k: torch.cat([none[k].expand_as(cond[k]), cond[k]]) for k in cond}  # the pipelines put "no prompt" first
        t = seen["t"].float().reshape(-1).expand(4)
        out, _ = models.load_denoiser(family)(seen["in"], t, both)
    assert_close(out, seen["out"].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_early_stop_equals_full_forward(teachers, conditionings, name):
    family, cond = teachers[name], conditionings[name]
    denoiser, x = models.load_denoiser(family), latents(teachers[name])
    ran = []
    for block in family.taps(denoiser.net)[1:2]:
        block.register_forward_hook(lambda *_: ran.append(1))
    out, maps = denoiser(x, TIMES, cond, want="both")
    assert ran == [1]
    nothing, stopped = denoiser(x, TIMES, cond, want="features")
    assert nothing is None and ran == [1]  # the block after the last tap did not run
    for a, b in zip(maps, stopped, strict=True):
        assert torch.equal(a, b)
    plain, none = denoiser(x, TIMES, cond)
    assert torch.equal(plain, out) and none == []
    assert [m.shape[1] for m in maps] == family.taps(denoiser.net)[2]
    assert out.shape == x.shape and out.dtype == torch.float32
    assert not any(m._forward_hooks or m._forward_pre_hooks for b in family.taps(denoiser.net)[0] for m in [b])


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_samples_and_maps_lie_where_the_image_does(teachers, conditionings, name):
    family, cond = teachers[name], conditionings[name]
    denoiser, x = models.load_denoiser(family), latents(teachers[name])
    with torch.no_grad():
        out, maps = denoiser(x, TIMES, cond, want="both")
        for i in range(2):
            one, its_maps = denoiser(x[i:i + 1], TIMES[i:i + 1], {k: c[i:i + 1] for k, c in cond.items()}, want="both")
            assert_close(one, out[i:i + 1], atol=1e-5, rtol=1e-4)
            assert_close(its_maps[0], maps[0][i:i + 1], atol=1e-5, rtol=1e-4)
        moved = x.clone()
        moved[..., :4, -4:] += 3  # the first tapped map changes most where the latent did: top right
        change = (denoiser(moved, TIMES, cond, want="features")[1][0] - maps[0]).abs().sum(1).flatten(0, -3).sum(0)  # (H, W)
    h, w = change.shape
    assert change.flatten().argmax() % w >= w - w // 3 and change.flatten().argmax() // w <= h // 3


def test_times_reach_the_network_unrounded(teachers, conditionings):
    for name, family in teachers.items():
        denoiser, seen = models.load_denoiser(family), []
        denoiser.bf16 = True  # as on a GPU
        denoiser.net.time_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0])) if hasattr(denoiser.net, "time_proj") else \
            denoiser.net.time_text_embed.time_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        out, _ = denoiser(latents(family), TIMES, conditionings[name])
        assert seen[0].dtype == torch.float32 and seen[0].tolist() == TIMES.tolist() and out.dtype == torch.float32


# --- Heads and discriminators ----------------------------------------------------------------------------------------

def test_heads_shapes_and_least_sizes():
    h2, h3 = models.Head2d(16), models.Head3d(16)
    for size in (8, 9, 32):
        assert h2(torch.randn(3, 16, size, size)).shape == (3,)
        assert h3(torch.randn(3, 16, 2, size, size)).shape == (3,)
    small = torch.randn(3, 16, 4, 4)  # the digits teacher's maps: enlarged to what the strides need
    assert torch.equal(h2(small), h2(torch.nn.functional.interpolate(small, scale_factor=2)))
    with pytest.raises(RuntimeError):
        h2(torch.randn(3, 16, 3, 8))
    assert [m.num_groups for m in h2.body if isinstance(m, torch.nn.GroupNorm)] == [32] * 4
    assert [tuple(m.kernel_size) for m in h2.body if isinstance(m, torch.nn.Conv2d)] == [(4, 4)] * 3 + [(3, 3)]
    assert all(tuple(m.kernel_size) == (3, 3, 3) for m in h3.body if isinstance(m, torch.nn.Conv3d))


def test_narrow_heads_see_something():
    """GroupNorm over a 1x1 map with one channel a group would make every logit the same."""
    logits = models.Head2d(16, width=32)(torch.randn(5, 16, 8, 8))
    assert logits.std() > 1e-3


def test_logits_are_means_over_positions_then_heads():
    head = models.Head2d(4, 16)
    head.body = torch.nn.Identity()
    head.to_logit = torch.nn.Linear(4, 1)
    small, large = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 16, 16)
    disc = models.Discriminator(None, [head, head])
    by_hand = [head.to_logit(m.permute(0, 2, 3, 1)).mean((1, 2, 3)) for m in (small, large)]
    assert_close(disc.logits([small, large]), (by_hand[0] + by_hand[1]) / 2)
    with pytest.raises(ValueError):
        disc.logits([small])


@pytest.mark.parametrize("name", ["tiny-sam", "tiny-dinov2"])
def test_pixel_discriminator(name):
    from models import load_pixel_backbone
    disc = models.PixelDiscriminator(load_pixel_backbone(name), width=32)
    images = (torch.rand(2, 3, 40, 56) * 2 - 1).requires_grad_()
    maps = disc.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8)] * 4
    disc.logits(maps).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in disc.backbone.parameters())
    size = disc.backbone.config.image_size
    image = torch.rand(1, 3, size, size) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    hidden = disc.backbone(((image + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    last = hidden[4] if name == "tiny-sam" else hidden[4][:, 1:].reshape(1, 8, 8, 16)
    assert_close(disc.features(image)[3], last.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


def test_bad_pixel_backbones(tmp_path):
    from models import load_pixel_backbone
    from transformers import Dinov2Config, Dinov2Model
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56)).save_pretrained(tmp_path / "small")
    for name in ("facebook/sam-vit-base", str(tmp_path), str(build("tiny-sd3") / "text_encoder"), str(tmp_path / "small")):
        with pytest.raises(BadInput, match="--pixel-backbone"):
            load_pixel_backbone(name)


def test_video_views_are_frames_of_the_decoded_video(teachers):
    family = teachers["tiny-cogvideox-2b"]
    vae, z = family.vae(), latents(family)
    with torch.no_grad():
        views = family.views(vae, z, (0.6, 0.0, 0.999))
        video = family.decode(vae, z[:, 1:3])
    assert torch.equal(views, torch.stack([video[0, :, 0], video[0, :, -1], video[1, :, 0], video[1, :, -1]]))


def test_decode_is_the_stock_pipelines(teachers):
    for name in ("tiny-sdxl", "tiny-sd3", "tiny-cogvideox-5b"):
        family = teachers[name]
        pipe, z = DiffusionPipeline.from_pretrained(family.folder), latents(family)
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            ours = (family.decode(family.vae(), z) / 2 + 0.5).clamp(0, 1)
            if name == "tiny-cogvideox-5b":
                theirs = pipe.video_processor.postprocess_video(pipe.decode_latents(z), output_type="pt").transpose(1, 2)
            else:
                shift = getattr(pipe.vae.config, "shift_factor", None) or 0
                theirs = pipe.image_processor.postprocess(pipe.vae.decode(z / pipe.vae.config.scaling_factor + shift)[0], output_type="pt")
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- Who gets gradient -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_networks_pass_gradient_and_keep_none(teachers, conditionings, name, lora_rank, checkpointing):
    """The generator's path: through the frozen fake network and the frozen discriminator into the student, and nowhere else."""
    family, cond = teachers[name], conditionings[name]
    schedule = family.schedule
    torch.manual_seed(0)
    teacher, student, fake = models.make_roles(family, ("student", "fake"), lora_rank, gradient_checkpointing=checkpointing)
    disc = models.LatentDiscriminator(teacher, 32)
    t, s = torch.tensor([700.0, 300.0]), torch.tensor([650.0, 250.0])

    def grads(module):
        parameters = module.own_parameters() if isinstance(module, models.Denoiser) else dict(module.named_parameters())
        return [p.grad for p in parameters.values()]
    with models.frozen(fake, disc.heads):
        x0_hat = schedule.to_x0_eps(latents(family), student(latents(family), TIMES, cond)[0], TIMES)[0]
        x_t = schedule.add_noise(x0_hat, latents(family, seed=1), t)
        x_fake = schedule.pf_ode_step(x_t, fake(x_t, t, cond)[0], t, s)
        (-disc.logits(disc.features(x_fake, s, cond)).mean()).backward()
    through = [g for g in grads(student) if g is not None]
    assert through and sum(float(g.abs().sum()) for g in through) > 0
    assert all(g is None for m in (fake, disc.heads) for g in grads(m))
    if not lora_rank:  # one copy of the base serves all roles: only then is the teacher a network of its own
        assert all(g is None for g in grads(teacher))
    everyone = {id(p) for p in teacher.net.parameters()}
    trained = {id(p) for d in (student, fake) for p in d.own_parameters().values()}
    assert all(not p.requires_grad and p.grad is None for p in teacher.net.parameters() if id(p) in everyone - trained)

    for p in student.own_parameters().values():
        p.grad = None
    disc.logits([m.detach() for m in disc.features(x_fake.detach(), s, cond)]).mean().backward()  # discriminator's phase
    assert all(g is not None for g in grads(disc.heads)) and all(g is None for m in (student, fake) for g in grads(m))
    disc.heads.zero_grad()
    fake(x_t.detach(), t, cond)[0].square().mean().backward()  # fake score's phase
    assert any(g is not None and g.abs().sum() > 0 for g in grads(fake))
    assert all(g is None for m in (student, disc.heads) for g in grads(m))


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-sd3", "tiny-cogvideox-5b"])
def test_checkpointing_changes_no_gradient(teachers, conditionings, name, lora_rank):
    family, cond, found = teachers[name], conditionings[name], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        teacher, student, fake = models.make_roles(family, ("student", "fake"), lora_rank, gradient_checkpointing=checkpointing)
        disc = models.LatentDiscriminator(teacher, 32)
        with torch.no_grad():
            for role in (student, fake):  # LoRA starts at zero: move both adapters, to tell them apart
                for i, p in enumerate(role.own_parameters().values()):
                    p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 100 * (role is fake)))
        with models.frozen(fake, disc.heads):
            x = student(latents(family), TIMES, cond)[0]
            x = fake(x, TIMES, cond)[0]
            disc.logits(disc.features(x, TIMES, cond)).mean().backward()
        found.append([p.grad for p in student.own_parameters().values() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_as_on_a_gpu(teachers, conditionings, name, lora_rank):
    """Frozen weights and embeddings held in bf16, bf16 compute, checkpointing: masters and their gradients stay float32."""
    family = teachers[name]
    cond = {k: c.bfloat16() for k, c in conditionings[name].items()}
    teacher, student, fake = models.make_roles(family, ("student", "fake"), lora_rank, "cpu", torch.bfloat16, gradient_checkpointing=True)
    for role in (teacher, student, fake):
        role.bf16 = True
    disc = models.LatentDiscriminator(teacher, 32)
    with models.frozen(fake, disc.heads):
        x = fake(student(latents(family), TIMES, cond)[0], TIMES, cond)[0]
        logits = disc.logits(disc.features(x, TIMES, cond))
        logits.mean().backward()
    assert x.dtype == logits.dtype == torch.float32 and {p.dtype for p in fake.own_parameters().values()} == {torch.float32}
    grads = [p.grad for p in student.own_parameters().values() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_frozen_restores_flags_also_after_an_error():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(KeyError), models.frozen(module):
        assert not module.weight.requires_grad
        raise KeyError
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_lora_roles_share_one_base(teachers, conditionings):
    family, cond, x = teachers["tiny-sd3"], conditionings["tiny-sd3"], latents(teachers["tiny-sd3"])
    teacher, student, fake = models.make_roles(family, ("student", "fake"), 4)
    assert teacher.net is student.net is fake.net
    original = models.load_denoiser(family)(x, TIMES, cond)[0]
    for role in (teacher, student, fake):
        assert_close(role(x, TIMES, cond)[0], original)  # an adapter starts as nothing
    with torch.no_grad():
        for p in student.own_parameters().values():
            p += 0.1
    assert not torch.allclose(student(x, TIMES, cond)[0], original, atol=1e-3)
    assert_close(teacher(x, TIMES, cond)[0], original)
    assert_close(fake(x, TIMES, cond)[0], original)


# --- Export ----------------------------------------------------------------------------------------------------------

def our_sample(family, denoiser, schedule, steps, cond, generator):
    x_T = torch.randn(2, *family.latent_shape(), generator=generator)
    if family.name == "tiny-sd3":  # its pipeline draws the noise between steps from the global generator
        torch.manual_seed(11)
        generator = None
    with torch.no_grad():
        return ode.student_sample(lambda x, t: denoiser(x, t, cond)[0], schedule, x_T, schedule.timesteps(steps)[:-1],
                                  lambda: torch.randn(x_T.shape, generator=generator))


@pytest.mark.parametrize("after_adp", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_pipeline_equals_our_sampler(teachers, conditionings, tmp_path, name, after_adp):
    """For several numbers of steps; what exports share, all but the scheduler, is opened once."""
    family = teachers[name]
    denoiser = models.load_denoiser(family)
    with torch.no_grad():
        for p in denoiser.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))  # a student, not the teacher
    schedule = ode.on_the_line(family.schedule) if after_adp else family.schedule
    opened = {}
    for steps in (1, 2, 3, 4, 8):
        folder = tmp_path / f"pipeline-{steps}"
        families.export.export_pipeline(denoiser, schedule, steps, family.latent_shape(), folder)
        pipe = DiffusionPipeline.from_pretrained(folder, **opened)
        opened = {part: module for part, module in pipe.components.items() if part != "scheduler"}
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(11)
        theirs = pipe(["a red fox", "two dogs"], num_inference_steps=steps, guidance_scale=1.0,
                      output_type="latent", generator=torch.Generator().manual_seed(7))[0]
        ours = our_sample(family, denoiser, schedule, steps, conditionings[name],
                          torch.Generator().manual_seed(7))
        assert_close(theirs, ours, atol=1e-4, rtol=0, msg=lambda m: f"{steps} steps: {m}")
        says = (folder / "README.md").read_text()
        assert f"num_inference_steps={steps}" in says and "height=" in says
        assert ("num_frames=9" in says) == ("cogvideox" in name)


def test_lora_export_merged_and_as_an_adapter(teachers, conditionings, tmp_path):
    for name in ("tiny-sd3", "tiny-sdxl"):
        family, cond, x = teachers[name], conditionings[name], latents(teachers[name])
        _, student = models.make_roles(family, ("student",), 4)
        with torch.no_grad():
            for p in student.own_parameters().values():
                p += 0.05
            ours = student(x, TIMES, cond)[0]
            families.export.export_pipeline(student, family.schedule, 4, family.latent_shape(), tmp_path / name)
            assert_close(models.load_denoiser(family, folder=tmp_path / name)(x, TIMES, cond)[0], ours, atol=1e-4, rtol=1e-4)
            pipe = DiffusionPipeline.from_pretrained(family.folder)
            pipe.load_lora_weights(tmp_path / name / "lora")
            assert_close(models.Denoiser(family, getattr(pipe, family.net_name))(x, TIMES, cond)[0], ours, atol=1e-4, rtol=1e-4)
