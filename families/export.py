"""A student as a stock diffusers pipeline."""

import json
import shutil
from contextlib import nullcontext

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from families.base import WEIGHTS
from ode import T, VPSchedule
from runtime.files import aside, write_json
from runtime.ranks import gather

LARGEST_FILE = 2 * 10**9  # bytes: as much of a student is in main memory at a time (ours)


def student_scheduler(family, schedule, steps):
    """The stock diffusers scheduler that walks the student's `schedule` in `steps` steps.

    It does what ode.student_sample does, in the stock pipeline of the family.
    """
    if isinstance(schedule, VPSchedule):
        # Predict x_0, re-noise: LCM's sampler with its skip connection off.
        a_bar = schedule.alphas_cumprod  # (1000,)
        before = torch.cat([a_bar.new_ones(1), a_bar[:-1]])  # (1000,)
        betas = 1 - a_bar / before  # (1000,)
        return diffusers.LCMScheduler(
            trained_betas=betas.tolist(),
            prediction_type=schedule.prediction,
            clip_sample=False,
            original_inference_steps=int(T),
            timestep_scaling=1e6,
        )
    if not schedule.renoise:  # see ode.on_the_line
        return diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            solver_order=1,
            final_sigmas_type="zero",
        )
    k, last = schedule.shift, None
    if not family.even_sigmas:
        k, last = stock_warp(schedule.shift, steps)
    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=k,
        shift_terminal=last,
        stochastic_sampling=True,
    )


def stock_warp(K, n):
    """(shift, shift_terminal) with which SD3's stock scheduler visits FlowSchedule(K)'s n times.

    That scheduler warps σ = linspace(1, σ_min) by its `shift` k, then stretches it to
    `shift_terminal`: Möbius maps that fix 1, as is the student's K u / (1 + (K − 1) u),
    u = 1 − i/n, so that some k gives it exactly. With σ_min warped by k too, k solves
    (k − 1) · 0.999 n K = k (n − 1) (K − 1) (1 + 0.001 (k − 1)).
    """
    if n == 1:
        return 1.0, None
    k = 1.0
    if K != 1:
        c = (n - 1) * (K - 1)
        b = 0.999 * (n * K - c)
        k = (b - (b * b - 4 * 0.001 * c * 0.999 * n * K) ** 0.5) / (2 * 0.001 * c)
    return k, K / (n + K - 1)


USAGE = """# A {steps}-step student of {base}

    pipe = diffusers.DiffusionPipeline.from_pretrained("path/to/this/folder")
    result = pipe("a red fox", {call})

Pass all of these, which model_index.json has as `_sampling`: the scheduler visits the student's own
times at this number of steps only, guidance is in the weights, and the size is what it was trained
at. The pipelines of Stable Diffusion 3, Wan and FLUX draw the noise between steps from torch's
global generator: seed that (generator=torch.manual_seed(0) does both) for a repeatable picture.
"""


def how_to_sample(family, steps, shape):
    """The arguments, beside prompts, of the call of an exported student's stock pipeline.

    shape: of its latents.
    """
    how = {
        "num_inference_steps": steps,
        "guidance_scale": family.guidance if family.embeds_guidance else 1.0,
        "height": shape[-2] * family.vae_scale,
        "width": shape[-1] * family.vae_scale,
    }
    if len(shape) == 4:
        how["num_frames"] = (shape[0] - 1) * family.frame_scale + 1
    if family.text_tokens not in (None, 256):
        how["max_sequence_length"] = family.text_tokens
    return how


def usage(family, how):
    """The README of an exported student that is sampled as `how_to_sample` says."""
    call = ", ".join(f"{name}={value}" for name, value in how.items())
    return USAGE.format(steps=how["num_inference_steps"], base=family.name, call=call)


def export_pipeline(student, schedule, steps, shape, folder, ranks=None):
    """Write `folder`: a diffusers pipeline of the student; what else it has is the teacher's.

    The student's weights are float32, the scheduler is that of its steps. A LoRA student is merged;
    its adapter alone goes into folder/lora, for `pipe.load_lora_weights`. shape: of a latent.

    ranks: those that hold the student together. All of them call it, and the first writes.
    """
    family = student.family
    first = ranks.first if ranks else lambda function: function()
    main = ranks is None or ranks.main
    with aside(folder) if main else nullcontext() as unfinished:
        first(lambda: write_companions(family, schedule, steps, shape, unfinished))
        weight_of = full_weights(student, main)
        if student.adapter:
            adapter = gather(student.own_parameters(), main)
            first(lambda: write_adapter(family, student.adapter, adapter, unfinished / "lora"))
            weight_of = merged_weights(student, adapter, main)
        write_weights(family, weight_of, unfinished, first)


def write_companions(family, schedule, steps, shape, folder):
    """Write all of a student's pipeline but the weights of its denoiser."""
    index = json.loads((family.folder / "model_index.json").read_text())
    for name in index:
        is_own = name in ("scheduler", family.net_name)
        if not is_own and (family.folder / name).is_dir():
            shutil.copytree(family.folder / name, folder / name)
    family.meta_net.save_config(folder / family.net_name)
    scheduler = student_scheduler(family, schedule, steps)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    # For programs, where it goes with the folder to the hub; diffusers passes over such names.
    index["_sampling"] = how_to_sample(family, steps, shape)
    index["_teacher"] = family.name
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "README.md").write_text(usage(family, index["_sampling"]))


def write_adapter(family, adapter, weights, folder):
    """Write the `weights` of an adapter of that name for `pipe.load_lora_weights`."""
    # peft leaves an adapter's name out of those of its weights.
    layers = {name.replace(f".{adapter}.", "."): w for name, w in weights.items()}
    family.pipeline_class.save_lora_weights(folder, **{f"{family.net_name}_lora_layers": layers})


def full_weights(student, main):
    """A function: name of a weight → the student's without its adapter, on the CPU where `main`.

    Elsewhere None. Every rank must call it for the same names, in the same order.
    """
    state = student.net.state_dict()
    state = {name.replace(".base_layer.", "."): x for name, x in state.items()}  # as before peft
    return lambda name: gather({name: state[name]}, main).get(name)


def teacher_weights(student, main):
    """As full_weights: those under a LoRA student's adapter.

    Read again, as a GPU holds them in fewer bits; but not with --random-init, of which is no file.
    """
    if student.family.random_init:
        return full_weights(student, main)
    if not main:
        return lambda name: None
    return student.family.weights().read


def merged_weights(student, adapter, main):
    """As full_weights, with the product of the adapter's two factors {name: tensor} added."""
    base = teacher_weights(student, main)

    def weight_of(name):
        w = base(name)
        layer = name.removesuffix(".weight")
        b = adapter.get(f"{layer}.lora_B.{student.adapter}.weight")  # (out, rank)
        if b is None:
            return w
        a = adapter[f"{layer}.lora_A.{student.adapter}.weight"]  # (rank, in)
        return w.float() + b @ a  # alpha = rank: see make_roles

    return weight_of


def write_weights(family, weight_of, folder, first):
    """Write the denoiser's weights, file by file, as diffusers does.

    weight_of(name): the whole tensor, on the rank that writes. first: as Ranks.first.
    """
    files = split_torch_state_dict_into_shards(
        family.meta_net.state_dict(),
        filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors",
        max_shard_size=LARGEST_FILE,
    )
    for file, names in files.filename_to_tensors.items():
        write_file(names, weight_of, folder, f"{family.net_name}/{file}", first)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        file = f"{family.net_name}/{WEIGHTS}.safetensors.index.json"
        first(lambda: write_json(folder / file, index))


def write_file(names, weight_of, folder, file, first):
    """Write the weights of these names in float32 as one file, and keep none of them."""
    tensors = {name: weight_of(name) for name in names}

    def write():
        whole = {name: x.float().contiguous() for name, x in tensors.items()}
        save_file(whole, folder / file, {"format": "pt"})

    first(write)
