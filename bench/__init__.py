# SPDX-License-Identifier: Apache-2.0
"""Measures Orlop on the machine it runs on: ratios to a floor taken in the same run. `python -m bench --help`."""
