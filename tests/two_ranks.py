"""torchrun --nproc_per_node=2 tests/two_ranks.py runs.json: several runs in one launch.

By the scripts' own main functions. runs.json: [[stage, {field of its Config: value}], ...], with a
third entry where a copy of that run, less its last checkpoint, is to be resumed; the stage "pairs"
is data.py's. Beside a run's files: held-<rank>.json, the bytes that this rank held.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import adm
import adp
import data
import runtime.files
import runtime.folder
import runtime.script

STAGES = {
    "adm": (adm.main, adm.Config),
    "adp": (adp.main, adp.Config),
    "pairs": (data.pairs, data.PairsConfig),
}
torch.set_num_threads(1)
runtime.script.quiet()


def nbytes(tensors):
    """Of this rank's parts, as stored (FSDP pads each to the largest rank's), each storage once."""
    found = {}
    for x in tensors:
        own = x.to_local() if hasattr(x, "to_local") else x
        storage = own.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def observe(held):
    """From here on, runs of adm leave in `held` what this rank holds.

    {role: {"weights", "optimizer": bytes}}, and "gradients", "buffers" and "text encoders"; of a
    checkpoint "written", the most bytes at once, and "gathered", how many tensors were; and the
    bytes that it read of files for its networks, "loaded", and for a checkpoint, "restored".
    """
    make_roles = adm.make_roles
    encode = adm.encode_prompts
    clip = torch.nn.utils.clip_grad_norm_
    save = runtime.folder.Run.save
    write_tensors = runtime.folder.write_tensors
    full_tensor = DTensor.full_tensor
    restore = runtime.folder.Run.restore
    read = runtime.files.Tensors.read

    def spy_read(*args):
        rows = read(*args)
        held["read"] = held.get("read", 0) + rows.nbytes
        return rows

    def spy_restore(*args):
        held["loaded"] = held.pop("read", 0)
        done = restore(*args)
        held["restored"] = held.pop("read", 0)
        return done

    def spy_roles(family, roles, *args, **kwargs):
        made = make_roles(family, roles, *args, **kwargs)
        teacher, *learners = made
        trained = set()
        for role in learners:
            trained |= {id(p) for p in role.own_parameters().values()}
        frozen = [p for p in teacher.net.parameters() if id(p) not in trained]
        held["teacher"] = {"weights": nbytes(frozen)}
        held["buffers"] = nbytes(b for role in made for b in role.net.buffers())
        return made

    def spy_encode(*args):
        prompts = encode(*args)
        if hasattr(prompts, "pipe"):
            parts = prompts.pipe.components.values()
            encoders = [part for part in parts if isinstance(part, PreTrainedModel)]
            held["text encoders"] = nbytes(p for part in encoders for p in part.parameters())
        return prompts

    def spy_clip(parameters, limit):
        held.setdefault("gradients", []).append(nbytes(p.grad for p in parameters))
        return clip(parameters, limit)

    def spy_save(run, iteration, networks, optimizers, *args, **kwargs):
        for name, parameters in networks.items():
            held[name] = {"weights": nbytes(parameters.values())}
            if name in optimizers:
                moments = []
                for slots in optimizers[name].state.values():
                    moments += [slot for slot in slots.values() if slot.ndim]  # not the step
                held[name]["optimizer"] = nbytes(moments)
        held["written"] = held["gathered"] = 0
        DTensor.full_tensor = spy_full
        save(run, iteration, networks, optimizers, *args, **kwargs)
        DTensor.full_tensor = full_tensor

    def spy_write(path, tensors):
        held["written"] = max(held["written"], nbytes(tensors.values()))
        write_tensors(path, tensors)

    def spy_full(x):
        held["gathered"] += 1
        return full_tensor(x)

    adm.make_roles = spy_roles
    adm.encode_prompts = spy_encode
    torch.nn.utils.clip_grad_norm_ = spy_clip
    runtime.folder.Run.save = spy_save
    runtime.folder.Run.restore = spy_restore
    runtime.folder.write_tensors = spy_write
    runtime.files.Tensors.read = spy_read


held = {}
observe(held)
rank = os.environ["RANK"]
for stage, config, *interrupted in json.loads(Path(sys.argv[1]).read_text()):
    held.clear()
    out = Path(config["out"])
    if interrupted:
        if rank == "0":
            shutil.copytree(interrupted[0], out)
            shutil.rmtree(max((out / "checkpoints").iterdir()))
        torch.distributed.barrier()
    main, config_class = STAGES[stage]
    main(config_class(**config))
    (out / f"held-{rank}.json").write_text(json.dumps(held))
torch.distributed.destroy_process_group()
