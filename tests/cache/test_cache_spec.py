import pytest
from cache_fakes import spec

from cache.spec import CacheError, CacheSpec


def test_attributes_round_trip():
    assert CacheSpec.from_attributes(spec().to_attributes()) == spec()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_fingerprint", "blip2"),
        ("encoder_dtype", "int8"),
        ("image_preprocessing", "{size"),
        ("image_preprocessing", "[1]"),
        ("query_tokens", 0),
        ("query_tokens", "2"),
        ("width", 2.0),
        ("dtype", "float64"),
        ("format_version", 2),
    ],
)
def test_invalid_field_error_names_the_field(field, value):
    with pytest.raises(CacheError, match=field.replace("_", "[_ ]")):
        CacheSpec.from_attributes(spec().to_attributes() | {field: value})


def test_missing_field_error_names_the_field():
    attributes = spec().to_attributes()
    del attributes["width"]
    with pytest.raises(CacheError, match="lacks width"):
        CacheSpec.from_attributes(attributes)


def test_preprocessing_is_compared_as_json():
    assert spec(image_preprocessing='{"b": 1, "a": 2}') == spec(image_preprocessing='{"a":2,"b":1}')


def test_diff_lists_fields():
    other = spec("float32", image_preprocessing='{"size": 364, "mean": [0.5, 0.5, 0.5], "crop": true}')
    assert spec().diff(other) == [
        "image_preprocessing: crop: cache has nothing, wanted true; size: cache has 224, wanted 364",
        "dtype: cache has float16, wanted float32",
    ]
    assert spec().diff(spec()) == []


def test_row_bytes():
    assert [spec(dtype).row_bytes for dtype in ("float16", "bfloat16", "float32")] == [20, 20, 40]
