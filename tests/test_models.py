"""Tiny teachers of every family: opening, calling, tapping, heads, gradients, export."""

import json
import shutil
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline, FluxPipeline
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model

import families
import families.base
import families.export
import models
import ode
from families import load_teacher
from families.tiny import build
from families.video import Video
from families.wan import Wan
from models import PixelDiscriminator, load_pixel_backbone
from runtime.settings import BadInput

FAMILIES = families.TINY
SOME = ["tiny-sdxl", "tiny-sd3", "tiny-cogvideox-5b", "tiny-wan", "tiny-flux"]  # one of each
WAN_2_2 = "like-wan-2.2-5b"  # the fixture `teachers` has it too
TIMES = torch.tensor([999.0, 437.5])  # (2,)
PROMPTS = ["a red fox", "two dogs"]  # of the fixture `conditionings`


def latents(family, n=2, seed=0):
    """(n, *shape of the model's own size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *family.latent_shape(), generator=generator)


@pytest.fixture(scope="session")
def teachers(teachers, tmp_path_factory):
    """{model: Family} of the tiny ones, and one like Wan 2.2's 5B.

    Its pipeline shows the network a time for each token, and its VAE is another: residual, of
    patches, with a wider decoder.
    """
    folder = tmp_path_factory.mktemp("wan") / WAN_2_2
    shutil.copytree(build("tiny-wan"), folder)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "expand_timesteps": True}))
    own = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    own |= {"decoder_base_dim": 16, "scale_factor_spatial": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan.from_config({**vars(teachers["tiny-wan"].vae_config), **own})
    vae.save_pretrained(folder / "vae")
    return {**teachers, WAN_2_2: load_teacher(folder)}


@pytest.fixture(scope="session")
def conditionings(conditionings):
    """{name: conditioning of two prompts}"""
    return {**conditionings, WAN_2_2: conditionings["tiny-wan"]}


# --- Opening --------------------------------------------------------------------------------------


def as_stock(family, x):
    """Latents as the stock pipeline has them: Wan's has channels before frames, FLUX's tokens."""
    if family.name == "tiny-flux":
        return FluxPipeline._pack_latents(x, *x.shape)
    return x.transpose(1, 2) if isinstance(family, Wan) else x


def from_stock(family, x):
    """The same latents as ours are."""
    if family.name == "tiny-flux":
        side = 2 * round(x.shape[1] ** 0.5)
        return FluxPipeline._unpack_latents(x, side, side, 1)
    return as_stock(family, x)


INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"


def edited(tmp_path, name, file, **changes):
    """A copy of a tiny pipeline folder with one json file changed; "gone" takes an entry out."""
    folder = tmp_path / name
    shutil.copytree(build(name), folder)
    content = {**json.loads((folder / file).read_text()), **changes}
    kept = {key: value for key, value in content.items() if value != "gone"}
    (folder / file).write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    "name, prediction, shape, guidance, steps",
    [
        ("tiny-sdxl", "epsilon", (4, 32, 32), 5.0, 1),
        ("tiny-sd3", "flow", (16, 16, 16), 7.0, 4),
        ("tiny-cogvideox-2b", "v_prediction", (3, 16, 16, 16), 6.0, 4),
        ("tiny-cogvideox-5b", "v_prediction", (3, 16, 16, 16), 6.0, 4),
        ("tiny-wan", "flow", (3, 16, 16, 16), 5.0, 4),
        ("tiny-flux", "flow", (16, 16, 16), 3.5, 4),
    ],
)
def test_defaults_are_the_familys(teachers, name, prediction, shape, guidance, steps):
    family = teachers[name]
    assert family.schedule.prediction == prediction
    assert family.latent_shape() == shape
    assert family.guidance == guidance
    assert family.student_steps == steps


@pytest.mark.parametrize("name", FAMILIES)
def test_a_local_folder_of_the_same_classes_is_the_same_teacher(teachers, tmp_path, name):
    local = load_teacher(shutil.copytree(build(name), tmp_path / "local"))
    assert type(local) is type(teachers[name])
    assert local.weights_sha256 == teachers[name].weights_sha256


def test_tiny_teachers_are_the_same_every_time_and_differ(teachers):
    hashes = {name: family.weights_sha256 for name, family in teachers.items()}
    assert len(set(hashes.values())) == len(FAMILIES)
    before = torch.random.get_rng_state()
    build.cache_clear()
    assert load_teacher("tiny-sd3").weights_sha256 == hashes["tiny-sd3"]
    after = torch.random.get_rng_state()
    assert torch.equal(before, after)  # a run's own random numbers are untouched


INCOMPLETE = "no complete diffusers pipeline folder"


@pytest.mark.parametrize(
    "name, file, changes, says",
    [
        ("tiny-sdxl", SCHEDULER, {"prediction_type": "v_prediction"}, "predicts epsilon"),
        ("tiny-sdxl", SCHEDULER, {"rescale_betas_zero_snr": True}, "terminal SNR"),
        ("tiny-sdxl", SCHEDULER, {"num_train_timesteps": 500}, "1000 time steps"),
        (
            "tiny-sdxl",
            INDEX,
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "SDXL needs a VP",
        ),
        (
            "tiny-sd3",
            INDEX,
            {"scheduler": ["diffusers", "EulerDiscreteScheduler"]},
            "predicts a flow",
        ),
        ("tiny-sd3", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("tiny-sd3", SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling"),
        (
            "tiny-cogvideox-2b",
            SCHEDULER,
            {"prediction_type": "epsilon"},
            "predicts v_prediction",
        ),
        ("tiny-cogvideox-5b", SCHEDULER, {"rescale_betas_zero_snr": False}, "terminal SNR"),
        ("tiny-wan", SCHEDULER, {"use_flow_sigmas": False}, "predicts a flow"),
        ("tiny-wan", SCHEDULER, {"prediction_type": "epsilon"}, "predicts a flow"),
        ("tiny-wan", SCHEDULER, {"num_train_timesteps": 500}, "1000 training time steps"),
        ("tiny-wan", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("tiny-wan", SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (
            "tiny-wan",
            INDEX,
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "two experts are not supported",
        ),
        (
            "tiny-flux",
            "transformer/config.json",
            {"guidance_embeds": False},
            "told no guidance: FLUX.1-schnell",
        ),
        ("tiny-flux", SCHEDULER, {"use_dynamic_shifting": False}, "in another way"),
        ("tiny-flux", SCHEDULER, {"time_shift_type": "linear"}, "in another way"),
        ("tiny-flux", SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling"),
        ("tiny-flux", INDEX, {"_class_name": "FluxControlPipeline"}, "is a FluxControlPipeline"),
        ("tiny-flux", INDEX, {"_class_name": "FluxFillPipeline"}, "is a FluxFillPipeline"),
        ("tiny-flux", INDEX, {"_class_name": "FluxKontextPipeline"}, "is a FluxKontextPipeline"),
        ("tiny-flux", INDEX, {"_class_name": "Flux2Pipeline"}, "is a Flux2Pipeline"),
        ("tiny-sd3", INDEX, {"_class_name": "gone"}, INCOMPLETE),
        ("tiny-sdxl", SCHEDULER, {"beta_schedule": "odd"}, INCOMPLETE),
        (
            "tiny-cogvideox-2b",
            "transformer/config.json",
            {"patch_size_t": 2, "patch_bias": False},
            "time patches .* not supported",
        ),
        ("tiny-sd3", INDEX, {"scheduler": "gone"}, INCOMPLETE),
        ("tiny-sd3", INDEX, {"scheduler": ["diffusers", "NoSuchScheduler"]}, INCOMPLETE),
    ],
)
def test_contradicting_folders_are_refused(tmp_path, name, file, changes, says):
    with pytest.raises(BadInput, match=says):
        load_teacher(edited(tmp_path, name, file, **changes))


def test_damaged_and_missing_weights_are_refused(tmp_path):
    folder = shutil.copytree(build("tiny-sd3"), tmp_path / "sd3")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cannot load its transformer"):
        models.load_denoiser(load_teacher(folder))
    weights.unlink()
    with pytest.raises(BadInput, match="no weights"):
        load_teacher(folder)


@pytest.mark.parametrize("change", ["missing", "more rows", "fewer rows"])
def test_other_weights_are_refused(tmp_path, change):
    folder = shutil.copytree(build("tiny-sd3"), tmp_path / "sd3")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    name = "proj_out.weight"
    w = weights.pop(name)  # (rows, in)
    if change == "more rows":
        weights[name] = torch.cat([w, w])
    elif change == "fewer rows":
        weights[name] = w[:1].clone()
    save_file(weights, file)
    with pytest.raises(BadInput, match=f"cannot load its transformer: {name} is missing"):
        models.load_denoiser(load_teacher(folder))


def test_weights_in_several_files_and_16_bits_are_the_same_to_rounding(tmp_path):
    """As the hub has them, with an index."""
    folder = shutil.copytree(build("tiny-sd3"), tmp_path / "sd3")
    (file,) = (folder / "transformer").glob("*.safetensors")
    net = load_teacher(folder).network()
    file.unlink()
    net.to(torch.float16).save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    again = load_teacher(folder).network()
    for name, w in again.state_dict().items():
        assert w.dtype == torch.float32
        assert_close(w, net.state_dict()[name].float(), atol=0, rtol=0)


def test_an_unreadable_index_is_refused(tmp_path):
    (tmp_path / INDEX).write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=f"{INCOMPLETE}: UnicodeDecodeError"):
        load_teacher(tmp_path)


def test_scheduler_settings_are_read_not_guessed(tmp_path):
    sd3 = load_teacher(edited(tmp_path, "tiny-sd3", SCHEDULER, shift=2.0))
    assert sd3.schedule.shift == 2.0
    assert load_teacher("tiny-wan").schedule.shift == 3.0
    wan = load_teacher(edited(tmp_path, "tiny-wan", SCHEDULER, flow_shift=5.0))
    assert wan.schedule.shift == 5.0
    cog_2b = load_teacher(edited(tmp_path, "tiny-cogvideox-2b", SCHEDULER, snr_shift_scale=1.0))
    cog_5b = load_teacher("tiny-cogvideox-5b")  # whose own it is
    assert_close(cog_2b.schedule.alphas_cumprod, cog_5b.schedule.alphas_cumprod)


def test_wan_2_2s_5b_has_a_size_of_its_own(tmp_path):
    """By its name and from a folder: a student says so, for the stock call has another."""
    family = load_teacher("wan-2.2-5b", random_init=True)
    size = {"height": 704, "width": 1280, "num_frames": 121}
    how = families.export.how_to_sample(family, 4, family.latent_shape())
    assert how == {"num_inference_steps": 4, "guidance_scale": 1.0, **size}
    assert family.schedule.shift == 5.0 and family.fps == 24
    changes = {"_sampling": "gone", "expand_timesteps": True}
    local = load_teacher(edited(tmp_path, "tiny-wan", INDEX, **changes))
    assert local.latent_shape() == (31, 16, 704 // 4, 1280 // 4)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(BadInput, match="unknown model 'sd9'"):
        load_teacher("sd9")
    with pytest.raises(BadInput, match=INCOMPLETE):
        load_teacher(tmp_path)


@pytest.mark.parametrize("name", families.HUB)
def test_an_unreachable_hub_is_one_line_that_names_a_tiny_model_instead(name):
    with pytest.raises(BadInput, match="cannot fetch.*--model tiny-") as e:
        load_teacher(name)
    said = str(e.value)
    instead = said.split("--model ")[1].split()[0]
    assert instead in families.TINY
    assert "\n" not in said


@pytest.mark.parametrize(
    "name, resolution, frames, says",
    [
        ("tiny-sdxl", "60", None, "multiples of 8"),
        ("tiny-sdxl", "32", None, "at least 8x8"),
        ("tiny-sd3", "16", None, "at least 8x8"),
        ("tiny-sd3", "96", None, "at most 64 pixels"),
        ("tiny-sd3", "33", None, "multiples of 4"),
        ("tiny-sd3", "big", None, "pixels, as 1024"),
        ("tiny-sd3", "-32", None, "pixels, as 1024"),
        ("tiny-sd3", "32x32x32", None, "pixels, as 1024"),
        ("tiny-sd3", "0", None, "at least 8x8"),
        ("tiny-sd3", None, 9, "video"),
        ("tiny-cogvideox-2b", None, 8, "8n \\+ 1 frames"),
        ("tiny-cogvideox-2b", None, 5, "8n \\+ 1 frames"),
        ("tiny-cogvideox-2b", None, 1, "8n \\+ 1 frames"),
        ("tiny-cogvideox-2b", "100", None, "multiples of 16"),
        ("tiny-cogvideox-2b", "64", None, "at least 8x8"),
        ("tiny-wan", None, 8, "4n \\+ 1 frames"),
        ("tiny-wan", None, 1, "4n \\+ 1 frames"),
        ("tiny-wan", "60", None, "multiples of 8"),
        ("tiny-wan", "56", None, "at least 8x8"),
        ("tiny-flux", "34", None, "multiples of 4"),
        ("tiny-flux", "28", None, "at least 8x8"),
        ("tiny-flux", None, 9, "video"),
    ],
)
def test_sizes_out_of_reach_are_refused(teachers, name, resolution, frames, says):
    with pytest.raises(BadInput, match=says):
        teachers[name].latent_shape(resolution, frames)


@pytest.mark.parametrize(
    "name, resolution, frames, shape",
    [
        ("tiny-sdxl", "64x96", None, (4, 32, 48)),
        ("tiny-sd3", "64", None, (16, 32, 32)),
        ("tiny-sd3", "32x48", None, (16, 16, 24)),
        ("tiny-cogvideox-2b", "128x144", 17, (5, 16, 16, 18)),
        ("tiny-cogvideox-5b", "144x128", 9, (3, 16, 18, 16)),
        ("tiny-wan", "64x72", 5, (2, 16, 16, 18)),
        ("tiny-flux", "32x48", None, (16, 16, 24)),
    ],
)
def test_other_sizes_run_through_the_discriminator(
    teachers, conditionings, name, resolution, frames, shape
):
    family = teachers[name]
    assert family.latent_shape(resolution, frames) == shape
    discriminator = models.LatentDiscriminator(models.load_denoiser(family), width=32)
    maps = discriminator.features(torch.randn(2, *shape), TIMES, conditionings[name])
    assert discriminator.logits(maps).shape == (2,)


# --- Conditioning ---------------------------------------------------------------------------------


def test_no_prompt_is_zeros_for_sdxl_and_the_empty_prompt_for_the_others(teachers):
    for name, family in teachers.items():
        pipe = family.text_pipeline()
        none = family.unconditional(pipe)  # {name: (1, ...)}
        empty = family.encode(pipe, [""])  # the same
        assert none.keys() == empty.keys()
        for part in none:
            if name == "tiny-sdxl":
                assert (none[part] == 0).all()
                assert (empty[part] != 0).any()
            else:
                assert torch.equal(none[part], empty[part])
                assert (none[part] != 0).any()


# --- The denoiser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, WAN_2_2])
def test_call_is_the_stock_pipelines(teachers, name):
    """One guided step of the stock pipeline from given noise: what its network gets and returns.

    Conditioning, time ids, rotary positions, time and CFG are ours there. Wan's runs twice, that of
    2.2 with a time for each token; FLUX's once, at an embedded guidance, which it is told beside a
    time of 1.
    """
    family = teachers[name]
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    pipe.set_progress_bar_config(disable=True)
    x = latents(family)  # (2, ...)
    stock = type(family.meta_net).forward
    passes = []

    def spy(net, *args, **kwargs):
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        out = stock(net, *args, **kwargs)[0]
        passes.append((from_stock(family, given), t.reshape(-1), from_stock(family, out)))
        return (out,)

    net = getattr(pipe, family.net_name)
    net.forward = spy.__get__(net)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    options |= family.index.get("_sampling", {})
    with torch.no_grad():
        pipe(PROMPTS, latents=as_stock(family, x), **options)
        text = family.text_pipeline()
        cond = family.encode(text, PROMPTS)
        none = family.unconditional(text)
        told = {}
        for part, c in cond.items():
            halves = [none[part].expand_as(c), c]  # the pipelines put "no prompt" first
            if len(passes) == 2:  # but where it has a pass of its own
                halves.reverse()
            told[part] = torch.cat(halves)  # (4, ...)
        x_t, t, theirs = (torch.cat(parts) for parts in zip(*passes, strict=True))
        if family.embeds_guidance:
            told = {**cond, "guidance": torch.full((2,), 3.0)}
            t = 1000 * t
            assert len(x_t) == 2
        t = t.unique().float().expand(len(x_t))  # it is one for all
        out, _ = models.load_denoiser(family)(x_t, t, told)
    assert_close(out, theirs.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_early_stop_equals_full_forward(teachers, conditionings, name):
    family, cond = teachers[name], conditionings[name]
    denoiser = models.load_denoiser(family)
    x = latents(family)
    _, following, channels = family.taps(denoiser.net)
    ran = []
    following.register_forward_hook(lambda *_: ran.append(1))

    out, maps = denoiser(x, TIMES, cond, want="both")
    assert ran == [1]
    nothing, stopped = denoiser(x, TIMES, cond, want="features")
    assert nothing is None
    assert ran == [1]  # the block after the last tap did not run
    plain, none = denoiser(x, TIMES, cond)
    assert none == []

    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.equal(plain, out)  # nothing stops it any more
    assert [m.shape[1] for m in maps] == channels  # later passes have not added to them
    for a, b in zip(maps, stopped, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_samples_one_by_one(teachers, conditionings, name):
    family, cond = teachers[name], conditionings[name]
    denoiser = models.load_denoiser(family)
    x = latents(family)
    with torch.no_grad():
        out, maps = denoiser(x, TIMES, cond, want="both")
        for i in range(2):
            row = slice(i, i + 1)
            its_cond = {part: c[row] for part, c in cond.items()}
            its_out, its_maps = denoiser(x[row], TIMES[row], its_cond, want="both")
            assert_close(its_out, out[row], atol=1e-5, rtol=1e-4)
            for one, many in zip(its_maps, maps, strict=True):
                assert_close(one, many[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_lie_where_the_image_does(teachers, conditionings, name):
    """The first tapped map changes most where the latent did: top right."""
    family, cond = teachers[name], conditionings[name]
    denoiser = models.load_denoiser(family)
    x = latents(family)
    moved = x.clone()
    moved[..., :4, -4:] += 3
    with torch.no_grad():
        before = denoiser(x, TIMES, cond, want="features")[1][0]  # (2, C, [F,] H, W)
        after = denoiser(moved, TIMES, cond, want="features")[1][0]
    change = (after - before).abs().sum(1).flatten(0, -3).sum(0)  # (H, W)
    height, width = change.shape
    row, column = divmod(int(change.flatten().argmax()), width)
    assert row <= height // 3
    assert column >= width - width // 3


@pytest.mark.parametrize("name", FAMILIES)
def test_times_reach_the_network_unrounded(teachers, conditionings, name):
    family = teachers[name]
    denoiser = models.load_denoiser(family)
    denoiser.bf16 = True  # as on a GPU
    time_proj = next(m for m in denoiser.net.modules() if isinstance(m, Timesteps))
    seen = []
    time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out, _ = denoiser(latents(family), TIMES, conditionings[name])
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == TIMES.tolist()
    assert out.dtype == torch.float32


# --- Heads and discriminators ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "head_class, conv, strided, plain",
    [
        (models.Head2d, nn.Conv2d, (4, 2, 1), (3, 1, 1)),
        (models.Head3d, nn.Conv3d, (3, (1, 2, 2), 1), (3, 1, 1)),
    ],
)
@torch.no_grad()
def test_heads_are_the_papers(head_class, conv, strided, plain):
    """Three strided stages and a plain one, GroupNorm(32) and SiLU in each; average; Linear."""
    torch.manual_seed(0)
    head = head_class(16)
    paper, linear = [], nn.Linear(256, 1)
    for channels, kernel_stride_padding in ((16, strided), *[(256, strided)] * 2, (256, plain)):
        stage = conv(channels, 256, *kernel_stride_padding), nn.GroupNorm(32, 256), nn.SiLU()
        paper += stage
    paper = nn.Sequential(*paper)
    theirs = [*paper.parameters(), *linear.parameters()]
    for p, ours in zip(theirs, head.parameters(), strict=True):
        assert p.shape == ours.shape
        ours += 0.1 * torch.randn(ours.shape)  # norms begin at 1 and 0
        p.copy_(ours)
    for side in (8, 9, 32):
        frames = [2] if conv is nn.Conv3d else []
        h = torch.randn(3, 16, *frames, side, side)  # (B, C, [F,] H, W)
        logits = linear(paper(h).flatten(2).mean(2))[:, 0]  # (3,)
        assert_close(head(h), logits, atol=1e-5, rtol=1e-5)


def test_heads_enlarge_maps_of_4x4_and_take_none_that_are_smaller():
    head = models.Head2d(16)
    small = torch.randn(3, 16, 4, 4)  # the digits teacher's maps
    assert torch.equal(head(small), head(F.interpolate(small, scale_factor=2)))
    with pytest.raises(RuntimeError):
        head(torch.randn(3, 16, 3, 8))


def test_narrow_heads_see_something():
    """GroupNorm over a 1x1 map with one channel a group would make every logit the same."""
    torch.manual_seed(0)
    logits = models.Head2d(16, width=32)(torch.randn(5, 16, 8, 8))  # (5,)
    assert logits.std() > 1e-3


def test_logits_are_means_over_heads():
    torch.manual_seed(0)
    heads = [models.Head2d(4, 16), models.Head2d(4, 16)]
    small, large = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 16, 16)
    disc = models.Discriminator(None, heads)
    by_hand = (heads[0](small) + heads[1](large)) / 2  # (2,)
    assert_close(disc.logits([small, large]), by_hand)
    with pytest.raises(ValueError):
        disc.logits([small])


VISION = ("tiny-sam", "tiny-dinov2")


@pytest.mark.parametrize("name", VISION)
def test_pixel_maps_are_the_backbones_layers_at_each_quarter_of_a_normalised_image(name):
    disc = models.PixelDiscriminator(load_pixel_backbone(name), width=32)
    backbone = load_pixel_backbone(name)  # of four layers
    size = backbone.config.image_size
    image = torch.rand(1, 3, size, size) * 2 - 1  # in [−1, 1]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normal = ((image + 1) / 2 - mean) / std  # (1, 3, size, size)
    hidden = backbone(normal, output_hidden_states=True).hidden_states
    for layer, ours in zip((1, 2, 3, 4), disc.features(image), strict=True):
        h = hidden[layer]
        if name == "tiny-dinov2":  # a class token comes first
            h = h[:, 1:].reshape(1, 8, 8, 16)
        assert_close(ours, h.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)  # (1, C, H', W')


@pytest.mark.parametrize("name", VISION)
def test_pixel_discriminator_takes_images_of_any_size_and_passes_gradient_to_them(name):
    backbone = load_pixel_backbone(name)
    disc = models.PixelDiscriminator(backbone, width=32)
    images = (torch.rand(2, 3, 40, 56) * 2 - 1).requires_grad_()
    maps = disc.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8)] * 4
    disc.logits(maps).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None for p in disc.heads.parameters())


def test_what_is_no_plain_vision_transformer_is_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "small")
    refused = {
        "facebook/sam-vit-base": "cannot load it",  # offline
        tmp_path: "cannot load it",
        build("tiny-sd3") / "text_encoder": "no plain vision transformer",
        tmp_path / "small": "4x4 feature maps are too small",
    }
    for name, why in refused.items():
        with pytest.raises(BadInput, match=f"--pixel-backbone {name}: .*{why}"):
            load_pixel_backbone(str(name))


@pytest.mark.parametrize("name", ["tiny-cogvideox-2b", "tiny-wan"])
def test_video_views_are_frames_of_the_decoded_video(teachers, name):
    family = teachers[name]
    vae = family.vae()
    z = latents(family)  # (2, 3, C, H, W)
    with torch.no_grad():
        views = family.views(vae, z, (0.6, 0.0, 0.999))  # (4, 3, H', W')
        video = family.decode(vae, z[:, 1:3])  # (2, 3, F', H', W')
    first, last = video[:, :, 0], video[:, :, -1]  # (2, 3, H', W') each
    assert torch.equal(views, torch.stack([first[0], last[0], first[1], last[1]]))


@contextmanager
def what_autograd_keeps(*modules):
    """Yields {storage: its bytes}, but for the modules' own parameters."""
    own = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


@pytest.mark.parametrize("name", [*SOME, WAN_2_2])
def test_a_decoder_that_recomputes_keeps_little_and_gives_the_same_gradient(teachers, name):
    """Bitwise, but of Wan's, which is added up frame by frame.

    What it makes again at a time, the rehearsal tracks.
    """
    family = teachers[name]
    sizes, gradients = {}, {}
    for how in ("plain", "recompute"):
        vae = family.vae()
        if how == "recompute":
            family.recompute(vae)
        z = latents(family)[:1].requires_grad_()  # (1, ...)
        with what_autograd_keeps(vae) as kept:
            images = family.views(vae, z, (0.6, 0.0, 0.999))  # (N, 3, H', W')
        sizes[how] = sum(kept.values())
        images.square().mean().backward()
        gradients[how] = z.grad
    largest = gradients["plain"].abs().max()
    rounding = 1e-6 * largest if isinstance(family, Wan) else 0
    assert largest > 0
    assert (gradients["recompute"] - gradients["plain"]).abs().max() <= rounding
    assert sizes["recompute"] < sizes["plain"] / 3


@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-wan"])
def test_of_a_decoders_normalisation_its_input_alone_is_kept(teachers, name):
    family = teachers[name]
    vae = family.vae()
    family.recompute(vae)
    norm = vae.decoder.mid_block.resnets[0].norm1
    channels = next(norm.parameters()).numel()
    frames = [4] * isinstance(family, Video)
    x = torch.randn(1, channels, *frames, 8, 8).requires_grad_()
    with what_autograd_keeps(norm) as kept:
        norm(x)
    assert kept == {x.untyped_storage().data_ptr(): x.nbytes}


@pytest.mark.parametrize("name", VISION)
def test_a_vision_encoder_that_recomputes_keeps_little_and_gives_the_same_gradient(name):
    sizes, gradients = {}, {}
    for how in ("plain", "recompute"):
        torch.manual_seed(0)  # of the heads, and the images
        disc = models.PixelDiscriminator(load_pixel_backbone(name), width=32)
        if how == "recompute":
            disc.recompute()
        images = torch.rand(1, 3, 64, 64).requires_grad_()
        with what_autograd_keeps(disc.backbone) as kept:
            maps = disc.features(images)  # [(1, C, H', W')]
        sizes[how] = sum(kept.values())
        disc.logits(maps).sum().backward()
        gradients[how] = images.grad
    assert torch.equal(gradients["plain"], gradients["recompute"])
    assert gradients["plain"].abs().max() > 0
    assert sizes["recompute"] < 0.7 * sizes["plain"]  # such small layers have large inputs


@pytest.mark.parametrize("model", ["digits", "tiny-sdxl", "tiny-cogvideox-5b", "tiny-wan"])
def test_images_for_the_pixel_discriminator_in_bf16_are_the_same_to_its_rounding(model):
    """Decoded and judged as on a GPU: bf16 has eight bits."""
    family = families.load_teacher(model)
    backbone = load_pixel_backbone("tiny-sam")
    z = torch.randn(4, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        judge = PixelDiscriminator(backbone.to(dtype), 32)
        with torch.no_grad():
            images = family.views(family.vae(dtype=dtype), z, (0.6, 0.0, 0.999))
            seen[dtype] = [images, *judge.features(images)]
    backbone.float()
    assert all(x.dtype == torch.bfloat16 for x in seen[torch.bfloat16])
    for exact, rounded in zip(*seen.values(), strict=True):
        error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0 < error < 0.03


@pytest.mark.parametrize("name", [*SOME, WAN_2_2])
def test_decode_is_the_stock_pipelines(teachers, name):
    family = teachers[name]
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    pipe.set_progress_bar_config(disable=True)
    z = latents(family)
    with torch.no_grad():
        ours = (family.decode(family.vae(), z) / 2 + 0.5).clamp(0, 1)
        if isinstance(family, Wan):  # its whole call, for the statistics of its latents are inside
            ended = lambda *args: {"latents": as_stock(family, z)}  # noqa: E731
            how = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
            theirs = pipe(PROMPTS, **how, **family.index["_sampling"], callback_on_step_end=ended)
            theirs = theirs.frames.transpose(1, 2)
        elif name == "tiny-cogvideox-5b":
            frames = pipe.decode_latents(z)  # (2, 3, F', H', W')
            theirs = pipe.video_processor.postprocess_video(frames, output_type="pt")
            theirs = theirs.transpose(1, 2)  # frames come first there
        else:
            config = pipe.vae.config
            shift = getattr(config, "shift_factor", None) or 0
            image = pipe.vae.decode(z / config.scaling_factor + shift)[0]  # (2, 3, H', W')
            theirs = pipe.image_processor.postprocess(image, output_type="pt")
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- Who gets gradient ----------------------------------------------------------------------------


def two_roles(family, lora_rank, **options):
    """(teacher, student, fake, discriminator) of one seed."""
    torch.manual_seed(0)
    roles = ("student", "fake")
    teacher, student, fake = models.make_roles(family, roles, lora_rank, **options)
    return teacher, student, fake, models.LatentDiscriminator(teacher, 32)


def trained(module):
    """The parameters that are a role's own, or the heads'."""
    if isinstance(module, models.Denoiser):
        return list(module.own_parameters().values())
    return list(module.parameters())


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained(module))


def has_none(*modules):
    return all(p.grad is None for module in modules for p in trained(module))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_networks_pass_gradient_and_keep_none(
    teachers, conditionings, name, lora_rank, checkpointing
):
    """In each phase of an iteration one network has gradient, whatever it went through."""
    family, cond = teachers[name], conditionings[name]
    schedule = family.schedule
    options = {"gradient_checkpointing": checkpointing}
    teacher, student, fake, disc = two_roles(family, lora_rank, **options)
    heads = disc.heads
    t, s = torch.tensor([700.0, 300.0]), torch.tensor([650.0, 250.0])  # (2,) each

    # The student's: through the frozen fake network and the frozen discriminator.
    x = latents(family)
    with models.frozen(fake, heads):
        x0_hat = schedule.to_x0_eps(x, student(x, TIMES, cond)[0], TIMES)[0]
        x_t = schedule.add_noise(x0_hat, latents(family, seed=1), t)
        x_fake = schedule.pf_ode_step(x_t, fake(x_t, t, cond)[0], t, s)
        logits = disc.logits(disc.features(x_fake, s, cond))
        (-logits.mean()).backward()
    assert has_gradient(student)
    assert has_none(fake, heads)
    adapted = {id(p) for p in (*trained(student), *trained(fake))}
    for p in teacher.net.parameters():  # with LoRA the others' adapters are among them
        assert id(p) in adapted or (p.grad is None and not p.requires_grad)

    # The discriminator's.
    for p in trained(student):
        p.grad = None
    maps = disc.features(x_fake.detach(), s, cond)
    disc.logits([m.detach() for m in maps]).mean().backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert has_none(student, fake)

    # The fake score's.
    disc.heads.zero_grad()
    fake(x_t.detach(), t, cond)[0].square().mean().backward()
    assert has_gradient(fake)
    assert has_none(student, heads)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_checkpointing_changes_no_gradient(teachers, conditionings, name, lora_rank):
    family, cond = teachers[name], conditionings[name]
    found = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing}
        _, student, fake, disc = two_roles(family, lora_rank, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # LoRA starts at zero: both adapters are moved, to tell them apart
            for p in (*trained(student), *trained(fake)):
                p += 0.02 * torch.randn(p.shape, generator=generator)
        with models.frozen(fake, disc.heads):
            x = student(latents(family), TIMES, cond)[0]
            x = fake(x, TIMES, cond)[0]
            disc.logits(disc.features(x, TIMES, cond)).mean().backward()
        found.append([p.grad for p in trained(student) if p.grad is not None])
    for plain, checkpointed in zip(*found, strict=True):
        assert_close(plain, checkpointed, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_masters_and_gradients_are_float32_where_all_else_is_bf16(
    teachers, conditionings, name, lora_rank
):
    """As on a GPU: frozen weights and embeddings held in bf16, bf16 compute, checkpointing."""
    family = teachers[name]
    cond = {part: c.bfloat16() for part, c in conditionings[name].items()}
    options = {"frozen_dtype": torch.bfloat16, "gradient_checkpointing": True}
    teacher, student, fake, disc = two_roles(family, lora_rank, **options)
    for role in (teacher, student, fake):
        role.bf16 = True
    with models.frozen(fake, disc.heads):
        x = student(latents(family), TIMES, cond)[0]
        x = fake(x, TIMES, cond)[0]
        logits = disc.logits(disc.features(x, TIMES, cond))
        logits.mean().backward()
    assert x.dtype == torch.float32
    assert logits.dtype == torch.float32
    for p in (*trained(student), *trained(fake)):
        assert p.dtype == torch.float32
    assert has_gradient(student)
    for p in trained(student):
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())


def test_frozen_restores_flags_also_after_an_error():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(KeyError), models.frozen(module):
        assert not module.weight.requires_grad
        raise KeyError
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_lora_roles_share_one_base(teachers, conditionings):
    family, cond = teachers["tiny-sd3"], conditionings["tiny-sd3"]
    x = latents(family)
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


# --- Export ---------------------------------------------------------------------------------------


def our_sample(denoiser, schedule, steps, cond, generator):
    """What ode.py's sampler makes of the denoiser, (2, ...)."""
    family = denoiser.family
    like_ours = latents(family).shape  # (2, ...)
    like_stock = as_stock(family, latents(family)).shape  # (2, ...)
    if family.name == "tiny-flux":  # its pipeline packs what it has drawn, but between steps
        x_T = torch.randn(like_ours, generator=generator)
    else:
        x_T = from_stock(family, torch.randn(like_stock, generator=generator))
    times = schedule.timesteps(steps)[:-1]  # (steps,)
    if family.schedule.prediction == "flow":  # these pipelines draw noise between steps from
        torch.manual_seed(11)  # torch's global one
        generator = None

    def predict(x, t):
        return denoiser(x, t, cond)[0]

    def fresh():
        return from_stock(family, torch.randn(like_stock, generator=generator))

    with torch.no_grad():
        return ode.student_sample(predict, schedule, x_T, times, fresh)


@pytest.mark.parametrize("after_adp", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, WAN_2_2])
def test_exported_pipeline_equals_our_sampler(teachers, conditionings, tmp_path, name, after_adp):
    """For several numbers of steps; what exports share, all but the scheduler, is opened once."""
    family = teachers[name]
    denoiser = models.load_denoiser(family)
    with torch.no_grad():
        for p in denoiser.parameters():  # a student, not the teacher
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    schedule = family.schedule
    if after_adp:
        schedule = ode.on_the_line(schedule)
    opened = {}
    for steps in (1, 2, 3, 4, 8):
        folder = tmp_path / f"pipeline-{steps}"
        shape = family.latent_shape()
        families.export.export_pipeline(denoiser, schedule, steps, shape, folder)
        pipe = DiffusionPipeline.from_pretrained(folder, **opened)
        opened = {part: module for part, module in pipe.components.items() if part != "scheduler"}
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(11)
        how = json.loads((folder / INDEX).read_text())["_sampling"]
        generator = torch.Generator().manual_seed(7)
        theirs = pipe(PROMPTS, **how, output_type="latent", generator=generator)[0]
        theirs = from_stock(family, theirs)
        again = torch.Generator().manual_seed(7)
        ours = our_sample(denoiser, schedule, steps, conditionings[name], again)
        label = f"{steps} steps"
        assert_close(theirs, ours, atol=1e-4, rtol=0, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize(
    "name, told",
    [
        ("tiny-sd3", "guidance_scale=1.0, height=32, width=32)"),
        ("tiny-cogvideox-2b", "guidance_scale=1.0, height=128, width=128, num_frames=9)"),
        ("tiny-wan", "guidance_scale=1.0, height=64, width=64, num_frames=9)"),
        ("tiny-flux", "guidance_scale=3.5, height=32, width=32)"),
    ],
)
def test_an_exports_readme_says_how_it_is_called(teachers, tmp_path, name, told):
    family = teachers[name]
    shape = family.latent_shape()
    denoiser = models.load_denoiser(family)
    families.export.export_pipeline(denoiser, family.schedule, 3, shape, tmp_path / "out")
    says = (tmp_path / "out" / "README.md").read_text()
    assert f"num_inference_steps=3, {told}" in says
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    call = ", ".join(f"{argument}={value}" for argument, value in index["_sampling"].items())
    assert f'pipe("a red fox", {call})' in says and index["_teacher"] == name


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-sdxl", "tiny-wan", "tiny-flux"])
def test_lora_export_merged_and_as_an_adapter(teachers, conditionings, tmp_path, name):
    family, cond = teachers[name], conditionings[name]
    x = latents(family)
    _, student = models.make_roles(family, ("student",), 4)
    with torch.no_grad():
        for p in student.own_parameters().values():
            p += 0.05
        ours = student(x, TIMES, cond)[0]
        shape = family.latent_shape()
        families.export.export_pipeline(student, family.schedule, 4, shape, tmp_path / name)

        merged = models.load_denoiser(family, folder=tmp_path / name)
        assert_close(merged(x, TIMES, cond)[0], ours, atol=1e-4, rtol=1e-4)
        pipe = DiffusionPipeline.from_pretrained(family.folder)
        pipe.load_lora_weights(tmp_path / name / "lora")
        adapted = models.Denoiser(family, getattr(pipe, family.net_name))
        assert_close(adapted(x, TIMES, cond)[0], ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_export_holds_one_file_of_the_student_at_a_time(
    teachers, tmp_path, monkeypatch, lora_rank, random_init
):
    """And builds no second network; of many files it is the same student as of one."""
    family = teachers["tiny-sd3"]
    denoisers = models.make_roles(family, ("student",), lora_rank)
    student = denoisers[1]
    with torch.no_grad():
        for p in student.own_parameters().values():
            p += 0.05
    how = (student, family.schedule, 4, family.latent_shape())
    families.export.export_pipeline(*how, tmp_path / "one")
    one = models.load_denoiser(family, folder=tmp_path / "one").net.state_dict()

    def refuse(*args, **kwargs):
        pytest.fail("a second network is built")

    written = []  # weak references to what is in each file

    def spy(tensors, path, metadata=None):
        assert all(x() is None for file in written for x in file), "an earlier file's are held"
        made = [x for x in tensors.values() if x.data_ptr() not in of_student]
        written.append([weakref.ref(x) for x in made])
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 10_000
        save_file(tensors, path, metadata)

    of_student = {x.data_ptr() for x in student.net.state_dict().values()}
    monkeypatch.setattr(family, "random_init", random_init)  # then the weights are in no file
    monkeypatch.setattr(families.export, "LARGEST_FILE", 10_000)
    monkeypatch.setattr(families.export, "save_file", spy)
    with monkeypatch.context() as patch:
        patch.setattr(family.net_class, "__init__", refuse)
        families.export.export_pipeline(*how, tmp_path / "many")
    assert len(written) > 5 and (not lora_rank or any(written))

    monkeypatch.setattr(family, "random_init", False)
    many = models.load_denoiser(family, folder=tmp_path / "many").net.state_dict()
    assert_close(many, one, atol=0, rtol=0)
