"""A student as a stock diffusers pipeline."""

import json
import shutil

import diffusers
import torch

from ode import T, VPSchedule
from runtime.files import aside
from runtime.ranks import gather


def student_scheduler(schedule, steps):
    """The stock diffusers scheduler that walks the student's `schedule` in `steps` steps.

    It does what ode.student_sample does.
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
at. The pipelines of Stable Diffusion 3 and Wan draw the noise between steps from torch's global
generator: seed that (generator=torch.manual_seed(0) does both) for a repeatable picture.
"""


def how_to_sample(family, steps, shape):
    """The arguments, beside prompts, of the call of an exported student's stock pipeline.

    shape: of its latents.
    """
    how = {
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
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


def export_pipeline(student, schedule, steps, shape, folder, write=True):
    """Write `folder`: a diffusers pipeline of the student; what else it has is the teacher's.

    The student's weights are float32, the scheduler is that of its steps. A LoRA student is merged;
    its adapter alone goes into folder/lora, for `pipe.load_lora_weights`. shape: of a latent.

    Of a sharded student: called on every rank, and one of them is to `write`.
    """
    family = student.family
    own = student.own_parameters() if student.adapter else student.net.state_dict()
    weights = gather(own, write)
    if not write:
        return
    with aside(folder) as partial:
        index = json.loads((family.folder / "model_index.json").read_text())
        for name in index:
            is_own = name in ("scheduler", family.net_name)
            if not is_own and (family.folder / name).is_dir():
                shutil.copytree(family.folder / name, partial / name)
        if student.adapter:
            net = merged(family, student.adapter, weights, partial / "lora")
        else:
            with torch.device("meta"):
                net = family.net_class.from_config(family.config)
            net.load_state_dict(weights, assign=True)
        net.save_pretrained(partial / family.net_name)
        scheduler = student_scheduler(schedule, steps)
        scheduler.save_pretrained(partial / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        # For programs, where it goes with the folder to the hub; diffusers passes over such names.
        index["_sampling"] = how_to_sample(family, steps, shape)
        index["_teacher"] = family.name
        (partial / "model_index.json").write_text(json.dumps(index, indent=2))
        (partial / "README.md").write_text(usage(family, index["_sampling"]))


def merged(family, adapter, weights, folder):
    """Write an adapter to `folder`; the teacher's network with it merged in."""
    # peft leaves an adapter's name out of those of its weights.
    layers = {name.replace(f".{adapter}.", "."): w for name, w in weights.items()}
    family.pipeline_class.save_lora_weights(folder, **{f"{family.net_name}_lora_layers": layers})
    net = family.network()
    net.load_lora_adapter(
        folder,
        prefix=family.net_name,
        weight_name="pytorch_lora_weights.safetensors",
    )
    net.fuse_lora()
    net.unload_lora()
    return net
