"""The calls that a device is tried with, a page per family.

tests/test_cuda.py holds every promise against each of them, .ci/first_light.py makes each of them alone, and sanitizers
watch them (.ci/call_kernels.py). Together they reach every CUDA kernel in every version that is compiled.
"""

from calls import attention, compact, merge, score, score_and_select, select, selection, sparse24

FAMILIES = {
    page.__name__.removeprefix("calls."): page.CALLS
    for page in (select, selection, compact, merge, score_and_select, score, attention, sparse24)
}
CALLS = {f"{family}: {name}": call for family, calls in FAMILIES.items() for name, call in calls.items()}
