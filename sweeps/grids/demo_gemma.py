"""The demo's grid on Gemma 3 270M.

python -m sweeps.launch --sweep=sweeps/grids/demo_gemma.py --ledger=runs/demo-gemma3-270m/ledger --executor=local
"""

from experiments import demo_gemma
from sweeps import grid
from sweeps.grids import demo

EXPERIMENT = demo_gemma


def sweep() -> list[grid.Overrides]:
  return demo.sweep()
