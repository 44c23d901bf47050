"""The sections of benchmarks/on_gpu.py, one file each, and what they share.

timing.py   times, kernel counts, waits and memory of a device: what only a GPU can execute, beside its equivalent on a CPU
record.py   the JSON file of a section, rewritten after every step
quick.py    initial values drawn on the device, because a 7B model's take minutes on the host
env.py, gate.py, ceilings.py, layers.py, updates.py, memory_7b.py, learn.py   the sections: `run(record, options)`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
