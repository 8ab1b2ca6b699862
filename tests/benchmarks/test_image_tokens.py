"""What is told of digits drawn code by code: the committed figures, and their commands."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import image_tokens
from diffusers_curriculum.training.tasks.image_tokens import ImageTokens

RESULTS = image_tokens.ROOT / "benchmarks" / "results" / "image_tokens.json"


def test_each_kind_is_a_command_of_the_script() -> None:
    parsed = {
        kind: ImageTokens().parse([*words[2:], "--output_dir", "x"], machine=False)
        for kind, words in image_tokens.kinds().items()
    }
    assert [args.class_conditional for args in parsed.values()] == [True, True, False]
    assert [args.curriculum for args in parsed.values()] == ["none", "difficulty", "none"]
    assert len(image_tokens.commands()) == 3


def test_the_documents_tell_what_was_measured() -> None:
    found = json.loads(RESULTS.read_text("utf-8"))
    assert image_tokens.table(found) in image_tokens.README.read_text("utf-8")
    given, alone = found["kinds"]["classes"], found["kinds"]["no classes"]
    assert {len(values) for told in found["kinds"].values() for values in told.values()} == {3}
    shares = [np.mean(told) for told in (given["recognised"], alone["precision"], alone["recall"])]
    readme = (image_tokens.ROOT / "README.md").read_text("utf-8")
    assert "{:.2f} of 500; {:.2f} and {:.2f}".format(*shares) in readme
    # the bars that it was built for
    assert min(given["recognised"]) >= 0.9
    assert shares[2] >= 0.5
    made = sum(found["minutes"].values())
    assert max(made + minutes for minutes in given["minutes"] + alone["minutes"]) < 15
