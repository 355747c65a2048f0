"""What a first model costs beyond torch: `import seqzoo`, a model, and weights that ship.

    python benchmarks/startup.py [--rounds 5]

Each line is timed in a process of its own after `import torch`; the median of the rounds is kept, the smallest one
beside it. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _runs import write_result

CODE = """
import time
import torch
began = time.perf_counter()
{code}
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from seqzoo import list_models

    lines = {
        "import seqzoo": "import seqzoo",
        'create_model("mamba2_tiny")': 'import seqzoo\nseqzoo.create_model("mamba2_tiny")',
        **{
            f'create_model("{name}", pretrained=True)': f'import seqzoo\nseqzoo.create_model("{name}", pretrained=True)'
            for name in list_models(pretrained=True)
        },
    }
    rows = []
    for what, code in lines.items():
        times = [seconds(code) for _ in range(options.rounds)]
        rows.append({"what": what, "seconds": statistics.median(times), "least": min(times)})
        print(f"{what}: {rows[-1]['seconds']:.3f} s, at least {rows[-1]['least']:.3f}", flush=True)
    write_result("startup", {"settings": {"rounds": options.rounds, "beyond": "import torch"}, "rows": rows})


def seconds(code: str) -> float:
    """Of a new process, after `import torch`."""
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
