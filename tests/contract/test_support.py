"""The table of docs/support.md says what the methods do."""

import pytest

import hf_compress as hc
from tests.contract.conftest import METHOD_CONFIGS
from tests.contract.support import PAGE, every_type_is_known, printed, table


@pytest.mark.skipif(not every_type_is_known(), reason="this release of transformers lacks some architectures")
@pytest.mark.skipif(not hc.METHODS.keys() <= METHOD_CONFIGS.keys(), reason="methods of other packages are installed")
def test_the_page_has_the_table_that_is_printed():
    if not PAGE.is_file():
        pytest.skip("no docs beside the tests")
    assert printed(PAGE.read_text()) == table(), "run `python -m tests.contract.support`"
