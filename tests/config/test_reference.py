"""The written reference is the schema's: a default, a bound or a meaning that changes, changes there too."""

from __future__ import annotations

from tools.config_reference import TARGET, reference


def test_configuration_reference_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == reference(), "run python tools/config_reference.py"
    for key in ("`model.rope_scaling.factor`", "`data.train`", "`llama3.1-405b` | 405,853,388,800"):
        assert key in reference()
