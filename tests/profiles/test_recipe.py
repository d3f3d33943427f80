"""Recipes: files, what is refused, and which site belongs to which entry."""

from __future__ import annotations

import json

import pytest

from countdown.errors import ConfigError
from countdown.methods import method
from countdown.profiles.recipe import Recipe, RecipeEntry, match

TEXT = """
- pattern: "*.mlp"
  method: m-countdown
  weighting: rms
  sparsity: 0.7
- method: teal
  decision: topk
"""
MEANT = Recipe(
    (
        RecipeEntry(method("m-countdown", weighting="rms", sparsity=0.7), "*.mlp"),
        RecipeEntry(method("teal", decision="topk"), "*"),
    )
)


def test_yaml_and_json_mean_the_same(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    entries = [
        {"pattern": "*.mlp", "method": "m-countdown", "weighting": "rms", "sparsity": 0.7},
        {"method": "teal", "decision": "topk"},
    ]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    assert Recipe.load(tmp_path / "r.yaml") == MEANT
    assert Recipe.load(tmp_path / "r.json") == MEANT
    for name in ("r.yaml", "r.json"):  # as some editors write them
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert Recipe.load(tmp_path / name) == MEANT


def test_settings_reach_every_entry():
    assert [entry.method.sparsity for entry in MEANT.with_settings(sparsity=0.4).entries] == [0.4, 0.4]
    with pytest.raises(ConfigError, match="weighting of teal is 'rms'"):
        MEANT.with_settings(weighting="rms")


@pytest.mark.parametrize(
    "content, message",
    [
        ("- method: cats\n  sparsty: 0.5", "entry 1 of .* has no field 'sparsty'.*Did you mean 'sparsity'"),
        ("- method: cats\n- metod: teal", "entry 2 of .* has no field 'metod'.*Did you mean 'method'"),
        ("- method: cast", "method is 'cast'.*Did you mean 'cats'"),
        ("- pattern: '*'", "entry 1 of .* names no method"),
        ("- method: cats\n  sparsity: 70", "0.7 skips 70%"),
        ("- method: cats\n  pattern: 3", "the pattern of entry 1 .* is 3"),
        ("method: cats", "is not a list of entries"),
        ("[]", "is not a list of entries"),
        ("- cats", "is not a list of entries"),
        ("- method: cats\n  sparsity: [", "is not YAML, near line 2; expected a list of entries such as: - {pattern"),
        ("- method: cats\n\tsparsity: 0.5", "is not YAML, near line 2;"),
        ("- !!python/object:os.system {}", "is not YAML, near line 1;"),
        ("- method: cats\n---\n- method: teal", "is not YAML, near line 2;"),
        ("- 2024-13-45", "is not YAML; expected"),
        ("\0", "is not YAML; expected"),
    ],
)
def test_mistakes_are_named(content, message, tmp_path):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        Recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)
    assert not any(word in str(error.value) for word in ("unicode string", "node", "token", "stream", "tag:"))


def test_mistakes_in_json_and_in_bytes_are_named(tmp_path):
    (tmp_path / "r.json").write_text('[\n{"method": "cats",}]')
    with pytest.raises(ConfigError, match=r'r\.json is not JSON, near line 2; expected .*: \[\{"pattern": "\*\.mlp", '):
        Recipe.load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('\ufeff[{"method": "cats"}]', encoding="utf-8")
    assert len(Recipe.load(tmp_path / "r.json").entries) == 1
    (tmp_path / "r.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"r\.json is not text in UTF-8\.$"):
        Recipe.load(tmp_path / "r.json")


def test_settings_of_a_named_recipe_are_its_own():
    published = Recipe.named("chess")
    assert Recipe.named("chess", weighting="rms") == published
    assert [entry.method.weighting for entry in published.entries] == ["rms", "none", "none"]
    with pytest.raises(ConfigError, match="'chess': weighting is 'rms' in this recipe, not 'none'"):
        Recipe.named("chess", weighting="none")
    with pytest.raises(ConfigError, match="'chess': method 'cats' has no field 'bits'"):
        Recipe.named("chess", bits=3)


def test_a_recipe_named_in_a_file_says_where_its_setting_is_wrong(tmp_path):
    (tmp_path / "r.yaml").write_text("- method: chess\n  bits: 3")
    with pytest.raises(ConfigError, match=r"entry 1 of .*: 'chess': method 'cats' has no field 'bits'"):
        Recipe.load(tmp_path / "r.yaml")


def test_what_is_no_recipe_is_said():
    with pytest.raises(ConfigError, match="has no entries"):
        Recipe(())
    with pytest.raises(ConfigError, match=r"config is 'cats', expected countdown\.method"):
        Recipe.of("cats")


ALPHAS = method("r-sparse", sparsity=0.3, alpha={"*.q_proj": 0.9, "*": 1.0})


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize(
    "given", [MEANT, Recipe.of(ALPHAS), Recipe.named("chess"), Recipe.named("d-proxy+wina", sparsity=0.4)], ids=str
)
def test_what_is_written_is_read_again(given, suffix, tmp_path):
    path = tmp_path / f"recipe{suffix}"
    given.save(path)
    assert Recipe.load(path) == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cats:weighting", "is not a list of settings"),
        ("d-proxy:bits=[1", "has a value that is neither a number nor a word"),
        ("d-proxy:bits=5", "bits of d-proxy is 5"),
        ("nope.yaml", "cannot be read"),
    ],
)
def test_what_no_name_on_the_command_line_can_be(text, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(text)


def test_a_name_on_the_command_line_has_settings():
    assert Recipe.parse("r-sparse:alpha=0.9,sparsity=0.3") == Recipe.of(method("r-sparse", alpha=0.9, sparsity=0.3))


def test_records_name_what_was_calibrated():
    (entry,) = Recipe.of(method("teal")).entries
    assert "pattern" not in Recipe((entry,)).record()
    assert Recipe((RecipeEntry(entry.method, "*.q_proj"),)).record()["pattern"] == "*.q_proj"
    assert [row["pattern"] for row in MEANT.record()["recipe"]] == ["*.mlp", "*"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"r\.yaml cannot be read: No such file or directory\.$"):
        Recipe.load(tmp_path / "r.yaml")


SITES = [
    ("layers.0.mlp", "ffn"),
    ("layers.1.mlp", "ffn"),
    ("layers.0.attn.q", "linear"),
    ("layers.0.mlp.up", "linear"),
    ("layers.1.attn.q", "linear"),
    ("layers.1.mlp.up", "linear"),
]


def test_the_first_entry_that_takes_a_site_or_the_ffn_around_it_has_it():
    owners = match([("layers.0.*", "ffn"), ("*.up", "linear"), ("*", "linear")], SITES)
    assert owners == {"layers.0.mlp": 0, "layers.1.mlp.up": 1, "layers.0.attn.q": 2, "layers.1.attn.q": 2}


@pytest.mark.parametrize(
    "entries, message",
    [
        ([("*.mlp", "linear")], r"'\*\.mlp' takes no module of the model: its method applies to layers\.0\.attn\.q, …"),
        ([("*", "ffn"), ("*.up", "linear")], r"'\*\.up' takes no module .*: earlier entries took all"),
        ([("*.up", "linear"), ("*", "ffn")], r"'\*' takes layers\.0\.mlp, but an earlier entry took its part"),
    ],
)
def test_entries_that_conflict_or_take_nothing_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        match(entries, SITES)


BUDGET = """
sparsity: 0.4
entries:
  - method: d-proxy
  - pattern: "*.self_attn.*"
    method: wina
"""


def test_entries_of_one_budget_stand_in_a_mapping(tmp_path):
    (tmp_path / "r.yaml").write_text(BUDGET)
    found = Recipe.load(tmp_path / "r.yaml")
    own = {"sparsity": 0.4, "allocation": "global"}
    entries = (RecipeEntry(method("d-proxy", **own)), RecipeEntry(method("wina", **own), "*.self_attn.*"))
    assert found == Recipe(entries, "global")
    assert Recipe.of_record(found.record()) == found
    assert Recipe.of_record(json.loads(json.dumps(found.with_settings(allocation="uniform").record()))) != found
    assert found.record()["allocation"] == "global"
    assert found.lines() == [
        "*: d-proxy, 4 bits, threshold",
        "*.self_attn.*: teal × shared-norm, threshold",
        "one budget, global, at 0.4",
    ]


def test_one_entry_has_a_budget_of_its_own(tmp_path):
    (tmp_path / "r.yaml").write_text("sparsity: 0.4\nentries: [{method: teal}]")
    assert Recipe.load(tmp_path / "r.yaml") == Recipe.of(method("teal", sparsity=0.4, allocation="global"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("entries: []", "is not a list of entries such as"),
        ("sparsity: 0.5\nentries: 3", "is not a list of entries such as"),
        ("entries: [{method: cats}]\nsparsty: 0.5", "has no field 'sparsty'.*Did you mean 'sparsity'"),
        ("entries: [{method: cats, sparsity: 0.5}]", "entry 1 of .* has sparsity of its own, and all entries have one"),
        ("entries: [{method: cats, allocation: global}]", "entry 1 of .* has allocation of its own"),
        ("sparsity: 1.5\nentries: [{method: cats}]", "sparsity of cats is 1.5, expected 0 ≤ sparsity < 1"),
        ("sparsity: half\nentries: [{method: cats}]", "sparsity of cats is 'half', expected a number"),
        ("allocation: globl\nentries: [{method: cats}]", "Did you mean 'global'"),
        ("allocation: greedy\nentries: [{method: cats}]", "allocation of cats is 'greedy', expected one of"),
        (
            "allocation: greedy\nentries: [{method: teal, pattern: '*.q'}, {method: teal}]",
            "allocation 'greedy' is for single entries; one budget for all takes: global, uniform",
        ),
        ("- method: d-proxy+wina", "entry 1 of .* whose entries have a budget of their own: name it by itself"),
    ],
)
def test_bad_budgets_say_what_is_wrong(content, message, tmp_path):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(tmp_path / "r.yaml")


def test_entries_of_one_budget_must_agree():
    differ = (RecipeEntry(method("cats", allocation="global")), RecipeEntry(method("teal")))
    with pytest.raises(ConfigError, match="one sparsity, and the recipe's allocation"):
        Recipe(differ, "global")
