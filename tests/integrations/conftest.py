"""What several files of tests of one integration start from."""

import logging

import fake_vllm
import mla_models
import pytest

from mla_fp8.integrations import absorbed_layer


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Each test hears what enabled layers say once a process."""
    absorbed_layer.warn_once.cache_clear()


@pytest.fixture
def inputs():
    return mla_models.prompt()


@pytest.fixture
def fresh_vllm(monkeypatch):
    fake_vllm.forget(monkeypatch)


@pytest.fixture
def vllm(fresh_vllm, monkeypatch):
    return fake_vllm.install_with_plugin(monkeypatch)


@pytest.fixture
def log(caplog):
    """Of the vLLM plugin; SGLang's tests have their own."""
    caplog.set_level(logging.INFO, logger="vllm.mla_fp8")
    return caplog
