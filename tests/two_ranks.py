"""torchrun --nproc_per_node=2 tests/two_ranks.py runs.json: several runs in one launch, by the scripts' own main functions.

runs.json: [[stage, {field of its Config: value}], ...], with a third entry where a copy of that run, less its last checkpoint, is
to be resumed; the stage "pairs" is data.py's. Beside a run's files: held-<rank>.json, the bytes
that this rank held.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import runtime.files
import runtime.folder
import runtime.optimize
import runtime.ranks
import runtime.script
import runtime.settings
import adm
import adp
import data

STAGES = {"adm": (adm.main, adm.Config), "adp": (adp.main, adp.Config),
          "pairs": (data.pairs, data.PairsConfig)}
torch.set_num_threads(1)
runtime.script.quiet()


def nbytes(tensors):
    """Of this rank's parts, as stored (FSDP pads each to the largest rank's), each storage once."""
    storages = [(t.to_local() if hasattr(t, "to_local") else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def observe(held):
    """From here on, runs leave in `held` {role: {"weights", "gradients", "optimizer", "buffers": bytes}}."""
    def spy_roles(family, roles, *args, make_roles=adm.make_roles, **kwargs):
        made = make_roles(family, roles, *args, **kwargs)
        trained = {id(p) for role in made[1:] for p in role.own_parameters().values()}
        held["teacher"] = {"weights": nbytes(p for p in made[0].net.parameters() if id(p) not in trained)}
        held["buffers"] = nbytes({id(b): b for role in made for b in role.net.buffers()}.values())
        return made

    def spy_clip(parameters, limit, clip=torch.nn.utils.clip_grad_norm_):
        held.setdefault("gradients", []).append(nbytes(p.grad for p in parameters))
        return clip(parameters, limit)

    def spy_save(run, iteration, networks, optimizers, *args, save=runtime.folder.Run.save, **kwargs):
        for name, parameters in networks.items():
            held[name] = {"weights": nbytes(parameters.values())}
            if name in optimizers:
                slots = [slot for slots in optimizers[name].state.values() for slot in slots.values() if slot.ndim]
                held[name]["optimizer"] = nbytes(slots)
        return save(run, iteration, networks, optimizers, *args, **kwargs)
    adm.make_roles, torch.nn.utils.clip_grad_norm_, runtime.folder.Run.save = spy_roles, spy_clip, spy_save


held = {}
observe(held)
for stage, config, *interrupted in json.loads(Path(sys.argv[1]).read_text()):
    held.clear()
    if interrupted and os.environ["RANK"] == "0":
        shutil.copytree(*interrupted, config["out"])
        shutil.rmtree(sorted(Path(config["out"], "checkpoints").iterdir())[-1])
    if interrupted:
        torch.distributed.barrier()
    main, config_class = STAGES[stage]
    main(config_class(**config))
    (Path(config["out"]) / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))
torch.distributed.destroy_process_group()
