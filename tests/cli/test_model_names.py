"""What is no model is refused in plain words by every command that loads one, and before it is asked for at the Hub."""

import logging
import socket

import pytest

from .conftest import TINY_MOE, the_error

EXAMPLES = TINY_MOE.parent
COMMANDS = (("plan",), ("chat", "--prompt", "x"), ("trace", "-o", "t.npz", "--prompt", "x"), ("bench", "--quick"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=COMMANDS, ids=lambda command: command[0])
def refused(request, run):
    command, *options = request.param
    return lambda name: the_error(run(command, name, *options))


def test_a_folder_that_is_not_there_is_not_taken_for_an_id(refused, tmp_path):
    for name in (tmp_path / "typo", "examples/models/typo", "./typo"):
        assert "there is no such folder, and it is not a valid Hub id, such as 'org/model'" in refused(name)


def test_a_folder_without_a_config_says_what_it_lacks(refused, tmp_path):
    assert "the folder has no config.json; name one that a model was saved to" in refused(tmp_path)


def test_an_adapter_is_told_from_a_model(refused):
    message = "it holds an adapter (adapter_config.json); name the model that the adapter is for"
    assert message in refused(EXAMPLES / "tiny-dense-c")


def test_a_hub_out_of_reach_is_waited_for_once(run, monkeypatch):
    asked = []

    def read(name, **options):
        asked.append(name)
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    error = the_error(run("chat", "org/model", "--prompt", "x"))
    absent = "there is no folder 'org/model' here, and no model of that name can be read from the Hub"
    assert error == f"error: {absent}: no connection"
    assert asked == ["org/model"]


def test_what_the_client_of_the_hub_tries_again_is_not_shown(run, monkeypatch, caplog):
    def read(name, **options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise OSError("no connection")

    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    the_error(run("plan", "nowhere"))
    assert not caplog.messages
    assert logger.level == logging.WARNING
