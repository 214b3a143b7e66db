import jax
import pytest

from bdlm_jax.runtime.door import memory_explained
from bdlm_jax.types import InputError


@pytest.mark.parametrize(
    "error", [MemoryError("no room for 9 GB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 9 GB\n---")]
)
def test_what_the_memory_does_not_hold_is_one_sentence(error):
    with pytest.raises(InputError, match=r"^the memory does not suffice \(no room for 9 GB\); buy more\.$"):  # noqa: SIM117
        with memory_explained("buy more"):
            raise error
    with pytest.raises(RuntimeError, match="else"), memory_explained("buy more"):
        raise RuntimeError("something else")
