"""pytest plugin: of the selected tests this process runs every ``count``-th, as VITQ_TEST_SHARE=index/count says."""

import os

import pytest


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    index, count = map(int, os.environ["VITQ_TEST_SHARE"].split("/"))
    mine = items[index::count]
    kept = set(map(id, mine))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = mine
