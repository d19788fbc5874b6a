"""What a series of rows begins with and ends with."""


def test_a_series_goes_on_after_a_row_that_fails_and_keeps_the_reason(script, tmp_path):
    found = script("series").measured_rows("no_such_script.py", {"one": {}, "two": {}}, tmp_path, threads=1)
    assert found["rows"] == {}
    assert list(found["failed"]) == ["one", "two"]
    assert all("no_such_script.py" in reason for reason in found["failed"].values())
    assert {"date", "conditions"} <= set(found)


def test_the_compared_models_are_there_once_they_are_named(script, tmp_path):
    models = script("series").compared_models(quick=True, made=tmp_path)
    assert list(models) == ["tiny-moe", "OLMoE-shaped"]
    assert all((folder / "config.json").exists() for folder in models.values())
