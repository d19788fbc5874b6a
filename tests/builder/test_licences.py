"""What the licences of sources come to."""

import time

import pytest

from transformers_moe_offload.builder.licences import Licence, Verdict, judged, licence_of
from transformers_moe_offload.errors import RecipeError


def verdict(*ids: str | None, **options) -> Verdict:
    return judged([Licence(f"org/{number}", id) for number, id in enumerate(ids)], **options)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("apache-2.0",), "apache-2.0"),
        (("apache-2.0", "apache-2.0"), "apache-2.0"),
        (("mit", "apache-2.0"), "apache-2.0"),
        (("bsd-3-clause", "mit"), "bsd-3-clause"),
        (("cc-by-4.0", "apache-2.0"), "apache-2.0"),
        (("mit", "gpl-3.0"), "gpl-3.0"),
        (("apache-2.0", "gpl-3.0"), "gpl-3.0"),
        (("gpl-3.0", "agpl-3.0"), "agpl-3.0"),
        (("lgpl-3.0", "gpl-3.0", "mpl-2.0"), "gpl-3.0"),
        (("cc-by-sa-4.0", "gpl-3.0"), "gpl-3.0"),
        (("mit", "cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "other"),
        (("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"), "cc-by-nc-sa-4.0"),
        (("apache-2.0", "llama3.1"), "llama3.1"),
        (("gemma", "mit"), "gemma"),
        ((), None),
        ((None, None), None),
    ],
)
def test_the_licence_of_the_whole(ids, expected):
    found = verdict(*ids)
    assert (found.id, found.conflicts) == (expected, ())


@pytest.mark.parametrize(
    "ids",
    [
        ("gpl-2.0", "apache-2.0"),
        ("gpl-2.0", "gpl-3.0"),
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("agpl-3.0", "llama3.1"),
        ("gemma", "gpl-3.0"),
        ("cc-by-nc-sa-4.0", "gpl-3.0"),
        ("cc-by-nc-sa-4.0", "llama3"),
        ("openrail", "cc-by-sa-4.0"),
        ("cc-by-nd-4.0",),
    ],
)
def test_licences_that_exclude_each_other_are_refused_with_both_and_the_knob(ids):
    for order in (ids, ids[::-1]):
        with pytest.raises(RecipeError, match=r"licences exclude each other: .*set checks\.licence to warn") as error:
            verdict(*order)
        assert all(id in str(error.value) for id in ids)
        found = verdict(*order, level="warn")
        assert len(found.conflicts) == 1
        assert found.conflicts[0] in found.warnings


def test_nothing_is_said_where_that_was_asked_for():
    found = verdict("gpl-2.0", "apache-2.0", None, level="off")
    assert found.conflicts
    assert found.warnings == ()


@pytest.mark.parametrize(("id", "shown"), [(None, "no licence"), ("other", "other"), ("my-own-1.0", "my-own-1.0")])
def test_what_is_not_known_is_flagged_and_not_guessed(id, shown):
    found = verdict("apache-2.0", id)
    assert found.id == "other"
    assert found.name == " and ".join(sorted(["apache-2.0", shown]))
    assert f"the licence of org/1 ({shown}) is not known to us" in found.warnings[0]


def test_two_licences_with_limits_of_their_own_hold_at_once():
    found = verdict("llama3.1", "gemma")
    assert (found.id, found.name) == ("other", "gemma and llama3.1")
    assert "llama3.1 and gemma all hold for the mixture at once" in found.warnings[0]
    assert len(found.notices) == 2
    found = verdict("llama3.1", "llama3.1")
    assert (found.id, found.warnings) == ("llama3.1", ())


def test_llama_wants_its_notice():
    (notice,) = verdict("llama3.2", "mit").notices
    assert notice.startswith("Built with Llama.")
    assert verdict("mit").notices == ()


def test_a_licence_of_its_own_is_kept_with_name_and_link_if_all_have_it():
    own = [Licence(f"org/{n}", "other", "tongyi-qianwen", "LICENSE") for n in range(2)]
    found = judged(own)
    assert (found.id, found.name, found.link) == ("other", "tongyi-qianwen", "LICENSE")
    assert len(found.warnings) == 1


def test_the_publisher_has_the_last_word_but_not_over_conflicts():
    assert verdict("mit", None, override="mit").id == "mit"
    with pytest.raises(RecipeError):
        verdict("gpl-2.0", "apache-2.0", override="mit")


CARD = "---\nlicense: {}\nlicense_name: terms\nlicense_link: https://example.org\n---\n# A model\n"


def test_a_card_says_what_the_licence_is(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD.format("Apache-2.0"))
    assert licence_of("org/model", card) == Licence("org/model", "apache-2.0", "terms", "https://example.org")


@pytest.mark.parametrize("text", ["# no metadata", "---\nlicense: [\n---\n", "---\nlicense: unknown\n---\n", "\xff"])
def test_a_card_that_does_not_say_or_cannot_be_read_says_nothing(tmp_path, text):
    card = tmp_path / "README.md"
    card.write_text(text, encoding="latin-1")
    assert licence_of("org/model", card).id is None
    assert licence_of("org/model", None).id is None


def test_a_card_that_stands_for_a_billion_values_says_nothing_and_takes_no_time(tmp_path):
    levels = "".join(f"x{n}: &{n} [{', '.join([f'*{n - 1}'] * 9)}]\n" for n in range(1, 9))
    card = tmp_path / "README.md"
    card.write_text(
        f"---\nx0: &0 [a, a, a, a, a, a, a, a, a]\n{levels}license: other\nlicense_name: *8\n---\n# A model\n"
    )
    start = time.process_time()
    assert licence_of("org/a", card) == Licence("org/a", None)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit\ndate: 2024-99-99", Licence("a", "mit")),
        ("license: other\nlicense_name: [x]\nlicense_link: 3", Licence("a", "other")),
        ("license: {a: b}", Licence("a", None)),
        ("license: mit\nlicense: gpl-3.0", Licence("a", None)),
        ("- mit", Licence("a", None)),
        ("license: [mit]", Licence("a", "mit")),
        ("license: !!set {mit}", Licence("a", None)),
    ],
)
def test_what_a_card_says_is_a_text_or_nothing(front, expected, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{front}\n---\n\ntext\n---\n")
    assert licence_of("a", card) == expected
