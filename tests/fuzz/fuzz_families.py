"""Every family by its name."""

from __future__ import annotations

import fuzz_data
import fuzz_models
import fuzz_runs
import fuzz_serving
from fuzz_kit import Family

FAMILIES: dict[str, Family] = {
    family.name: family for module in (fuzz_data, fuzz_models, fuzz_runs, fuzz_serving) for family in module.FAMILIES
}
