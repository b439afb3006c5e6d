"""A student as a stock diffusers pipeline.
"""

import json
import shutil

import diffusers
import torch

from ode import T, VPSchedule
from runtime.files import aside
from runtime.ranks import gather


def student_scheduler(schedule, steps):
    """The stock diffusers scheduler that walks the student's `schedule` in `steps` steps as ode.student_sample does. SD3's warps
    σ = linspace(1, σ_min) by its `shift` k, then stretches it to `shift_terminal`: Möbius maps that fix 1, as is the student's
    K u / (1 + (K − 1) u), u = 1 − i/n, so that some k gives it exactly."""
    if isinstance(schedule, VPSchedule):  # predict x_0, re-noise: LCM's sampler with its skip connection off
        a_bar = schedule.alphas_cumprod
        betas = 1 - a_bar / torch.cat([a_bar.new_ones(1), a_bar[:-1]])
        return diffusers.LCMScheduler(trained_betas=betas.tolist(), prediction_type=schedule.prediction, clip_sample=False,
                                      original_inference_steps=int(T), timestep_scaling=1e6)
    if not schedule.renoise:  # see ode.on_the_line
        return diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1,
                                                     final_sigmas_type="zero")
    K, n, k = schedule.shift, steps, 1.0
    if K != 1 and n > 1:  # (k − 1) · 0.999 n K = k (n − 1) (K − 1) (1 + 0.001 (k − 1)), since σ_min is warped by k too
        c = (n - 1) * (K - 1)
        b = 0.999 * (n * K - c)
        k = (b - (b * b - 4 * 0.001 * c * 0.999 * n * K) ** 0.5) / (2 * 0.001 * c)
    last = K / (n + K - 1) if n > 1 else None
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=k, shift_terminal=last, stochastic_sampling=True)


USAGE = """# A {steps}-step student of {base}

    pipe = diffusers.DiffusionPipeline.from_pretrained("path/to/this/folder")
    result = pipe("a red fox", num_inference_steps={steps}, guidance_scale=1.0, {size})

Pass all of these: the scheduler visits the student's own times at this number of steps only, guidance is in the weights, and the
size is what it was trained at. Stable Diffusion 3's pipeline draws the noise between steps from torch's global generator: seed that
(`torch.manual_seed`) for a repeatable picture.
"""

def export_pipeline(student, schedule, steps, shape, folder, write=True):
    """Write `folder`: a diffusers pipeline with the student's weights (float32) and the scheduler of its steps; the rest is the
    teacher's. A LoRA student is merged; its adapter alone goes into folder/lora, for `pipe.load_lora_weights`. shape: of a latent.
    Of a sharded student: called on every rank, and one of them is to `write`."""
    family = student.family
    state = gather(student.own_parameters() if student.adapter else student.net.state_dict(), write)
    if not write:
        return
    with aside(folder) as partial:
        index = json.loads((family.folder / "model_index.json").read_text())
        for name in [n for n in index if n not in ("scheduler", family.net_name) and (family.folder / n).is_dir()]:
            shutil.copytree(family.folder / name, partial / name)
        if student.adapter:  # by the names that peft gives an adapter's weights
            layers = {name.replace(f".{student.adapter}.", "."): w for name, w in state.items()}
            family.pipeline_class.save_lora_weights(partial / "lora", **{f"{family.net_name}_lora_layers": layers})
            net = family.network()
            net.load_lora_adapter(partial / "lora", prefix=family.net_name, weight_name="pytorch_lora_weights.safetensors")
            net.fuse_lora(), net.unload_lora()
        else:  # a plain network around the gathered weights
            with torch.device("meta"):
                net = family.net_class.from_config(family.config)
            net.load_state_dict(state, assign=True)
        net.save_pretrained(partial / family.net_name)
        scheduler = student_scheduler(schedule, steps)
        scheduler.save_pretrained(partial / "scheduler")
        (partial / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", type(scheduler).__name__]}, indent=2))
        size = f"height={shape[-2] * family.vae_scale}, width={shape[-1] * family.vae_scale}"
        size += f", num_frames={(shape[0] - 1) * family.config.temporal_compression_ratio + 1}" if len(shape) == 4 else ""
        size += f", max_sequence_length={family.text_tokens}" if family.text_tokens not in (None, 256) else ""
        (partial / "README.md").write_text(USAGE.format(steps=steps, base=family.name, size=size))
