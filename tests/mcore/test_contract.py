"""One test per seam into Megatron-Core: a failure names the upstream symbol that moved."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.mcore import contract


@pytest.mark.parametrize("seam", contract.SEAMS, ids=lambda seam: seam.symbol)
def test_seam(seam: contract.Seam) -> None:
    assert contract.problem_with(seam) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbol": "megatron.core.transformer.mlp.MLPX"}, r"mlp\.MLPX, which .* is gone"),
        ({"symbol": "megatron.core.nowhere.thing"}, r"core\.nowhere\.thing, which .* is gone"),
        ({"parameters": "self x"}, r"MLP\.forward, which .* takes \(self hidden_states"),
        ({"source": "no such line"}, r"MLP\.forward, which .* no longer holds 'no such line'"),
    ],
)
def test_a_moved_seam_is_named(change: dict[str, object], message: str) -> None:
    seam = dataclasses.replace(contract.SEAMS[0], **change)
    problem = contract.problem_with(seam)
    assert problem is not None
    assert re.search(message, problem)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    contract.check_version()
    monkeypatch.setattr(contract, "version", lambda _: "0.20.1")
    with pytest.raises(UserError, match=r"megatron-core 0\.20\.1 is installed.*>=0\.19\.2,<0\.20"):
        contract.check_version()
