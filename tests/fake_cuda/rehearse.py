"""The scripts on a GPU that is not there.

    python tests/fake_cuda/rehearse.py SHIM.so RUNS.json [--shallow]

Every tensor is fake, on a fake cuda:0: shapes, types, devices and storages are true, values are 0.
Networks of any size take no memory; --shallow ones have few layers, of full width. RUNS.json is a
list of

    {"name", "script": "adm", "adp", "encode", "pairs" or "decode", "words": [of its command line],
     "world": number of ranks, of which this is the first; 1 where it is not there,
     "blocks": networks of so many, and one iteration alone; else all}

or {"name", "script": "folder", "words": [model, path]}, for a model's folder with text encoders.

For each a line of json on stdout: what went wrong, when the host waited, what lay in memory, and of
which types parameters, gradients and times were.
"""

import gc
import json
import os
import sys
from pathlib import Path

import shim

ROOT = Path(__file__).resolve().parents[2]


def main():
    problem = shim.other_torch()
    if problem:
        sys.exit(problem)
    library, runs, *flags = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # FakeTensorMode is of one thread

    # Each of these is what the next imports, and must be as it is to be by then.
    shim.load(library)
    import device
    import files

    device.install()
    files.install()
    import notes

    notes.install()
    import stage

    gc.freeze()  # of all that is imported: it is looked through no more, which takes time
    if "--shallow" in flags:
        stage.make_shallow()
    for spec in json.loads(Path(runs).read_text()):
        name = spec.pop("name")
        print(json.dumps({"name": name, **stage.rehearse(**spec)}), flush=True)


if __name__ == "__main__":
    main()
