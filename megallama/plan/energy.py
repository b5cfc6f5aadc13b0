"""GPU-hours, energy and CO2 of a run, with the assumptions of Touvron et al. 2023 (arXiv:2302.13971, section 6).

Wh = GPU-hours x watts x PUE;  tCO2eq = MWh x 0.385, the US average in kg per kWh.
"""

from __future__ import annotations

from dataclasses import dataclass

PUE = 1.1
CO2_KG_PER_KWH = 0.385


@dataclass(frozen=True)
class Footprint:
    """What a number of GPU-hours costs."""

    gpu_hours: float
    mwh: float
    tonnes_co2: float


def footprint(gpu_hours: float, watts: float) -> Footprint:
    """Energy and CO2 of `gpu_hours` at `watts` per GPU."""
    mwh = gpu_hours * watts * PUE / 1e6
    return Footprint(gpu_hours, mwh, mwh * CO2_KG_PER_KWH)
