"""Which launches of the optimizers' tests are compiled afterwards."""

from collections.abc import Iterator

import pytest

from support.launched import unrecorded

# Between them every rule, dtype, mode and option. Others mix these anew, which is minutes of compiling and no news.
RECORDED = {"test_clipping.py", "test_parity.py", "test_precision.py", "test_traffic.py"}


@pytest.fixture(autouse=True)
def _recorded_where_there_is_something_new(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.name in RECORDED:
        yield
    else:
        with unrecorded():
            yield
