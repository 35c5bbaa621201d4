"""The measures by name, and the version of each. Plain Python, for tables and status.

A version rises when a value comes to mean something else. Values of an older version are shown as stale.
"""

VERSIONS = {
  'reconstruction': 1,
  'latents': 1,
  'progressive': 1,
  'refine': 1,
  'downstream': 1,
  'probes': 1,
  'n2g': 1,
  'simulate': 1,
  'ablation': 1,
}
# What is measured where none is named. The others take hours for a ledger.
USUAL = ('reconstruction', 'latents', 'progressive', 'refine', 'downstream', 'probes')
