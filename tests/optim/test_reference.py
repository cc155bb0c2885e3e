"""The rules in plain torch, found by the names that kernels have for them."""

import pytest

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD, reference
from llmfast_kernels.optimizer import RULES

CLASSES = {
    "adam": (FusedAdam, FusedAdamW),
    "sgd": (FusedSGD,),
    "rmsprop": (FusedRMSprop,),
    "adagrad": (FusedAdagrad,),
    "lion": (FusedLion,),
}


def test_every_rule_is_listed_and_is_that_of_its_classes() -> None:
    assert RULES.keys() == CLASSES.keys() <= set(dir(reference))
    for name, classes in CLASSES.items():
        assert all(cls.rule is getattr(reference, name) for cls in classes)


def test_another_name_is_told_which_there_are() -> None:
    with pytest.raises(AttributeError, match=r"^no optimizer has a rule 'muon'; there are .*adam.*lion"):
        reference.muon  # noqa: B018
    assert not hasattr(reference, "_Adam")
