"""The error tree is what its drawing says, and every error survives the wire."""

import json
import pickle

import pytest

from backcast import errors
from backcast.errors import BackcastError
from backcast.versions import Scope

EXAMPLES: list[BackcastError] = [
    BackcastError("broken", part="wheel"),
    errors.InvalidInput("an id is empty", id=""),
    errors.VersionRequired((0, 1)),
    errors.BatchTooLarge(10_001, 10_000),
    errors.NotFinite(2, "item", "B1"),
    errors.DataError("line 3 has no item", line=3),
    errors.IdempotencyKeyReused("morning", "0f"),
    errors.DimensionMismatch("vectors", (2, 4), (2, 5)),
    errors.NotFound("nothing there"),
    errors.UnknownVersion(7, (0, 1)),
    errors.UnknownId("item", "B00é/1", "v2-a.0"),
    errors.UnknownOperation("0f"),
    errors.UnknownSnapshot("v1-a"),
    errors.UnknownDeployment(9),
    errors.UnknownKey("search"),
    errors.UnknownConsumer("search"),
    errors.Conflict("not now"),
    errors.VersionNotPromoted(3, None, ()),
    errors.VersionOffChain(2, 3, (0, 1, 3), "rolled_back"),
    errors.PromotionConflict("too late", expected_version=None, current_version=1),
    errors.OperationRunning("0f", "promote", "load", 0.4, None),
    errors.OperationAbandoned("nobody runs it", operation="0f"),
    errors.OperationCancelled("0f", "ann", "clicks fell"),
    errors.NothingPublished(3),
    errors.LastAdminKey("1a2b3c4d"),
    errors.VersionInUse(0, pinned=["ads"], used={"search": "2026-11-20"}),
    errors.VersionRetired(0, (1, 2), "nobody reads it"),
    errors.SnapshotMismatch("v1-a", "v1-b.2"),
    errors.Unauthorized("no key"),
    errors.Forbidden("admin"),
    errors.NotReady("nothing is live"),
    errors.Draining(),
    errors.Overloaded("as much as it can"),
    errors.RateLimited("ranking", "vectors", 10_000, 5, 3),
    errors.ArtifactError("broken"),
    errors.ArtifactMissing("file:///a/b"),
    errors.WeightsDeleted(0, "2026-11-20"),
    errors.ArtifactUnwritable("file:///a/b", "No space left on device"),
    errors.ArtifactCorrupt("file:///a/b", "truncated"),
    errors.StoreError("does not answer"),
    errors.SnapshotNotLoaded("v1-a", "redis :6379"),
    errors.RegistryError("does not answer"),
    errors.SchemaMismatch(None, "0001"),
    errors.ConfigError("bad", variable="BACKCAST_DEVICE"),
    errors.ServiceError("502"),
]


def described(cls: type[BackcastError]) -> str:
    return cls.__name__


def family(cls: type[BackcastError]) -> list[type[BackcastError]]:
    children = [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    return [cls, *(d for child in children for d in family(child))]


def drawn() -> dict[str, str | None]:
    """Read the parent of each name off the drawing in the module's docstring."""
    drawing = (errors.__doc__ or "").split("\n\n")[1]
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in drawing.splitlines():
        branch = line.lstrip("│├└─ ")
        depth = (len(line) - len(branch)) // 4
        name = branch.split()[0]
        del path[depth:]
        parents[name] = path[-1] if path else None
        path.append(name)
    return parents


def test_drawing_is_the_tree() -> None:
    real = {
        cls.__name__: None if cls is BackcastError else cls.__mro__[1].__name__
        for cls in family(BackcastError)
    }
    assert drawn() == real


def test_codes_are_unique_and_own() -> None:
    classes = family(BackcastError)
    assert all("code" in vars(cls) for cls in classes)
    assert len({cls.code for cls in classes}) == len(classes)


def test_every_class_has_an_example() -> None:
    assert [type(error) for error in EXAMPLES] == family(BackcastError)


@pytest.mark.parametrize("cls", family(BackcastError), ids=described)
def test_class_is_found_by_code(cls: type[BackcastError]) -> None:
    assert BackcastError.by_code(cls.code) is cls


def test_unknown_code_finds_nothing() -> None:
    assert BackcastError.by_code("no-such-code") is None


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_the_wire(error: BackcastError) -> None:
    wire = json.dumps({"message": error.message, "data": error.data})
    again = type(error).rebuild(**json.loads(wire))
    assert type(again) is type(error)
    assert (again.message, again.data) == (error.message, error.data)
    assert str(again) == str(error) == error.message


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_a_process_boundary(error: BackcastError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.message, again.data, str(again)) == (error.message, error.data, str(error))


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (errors.VersionRequired((0, 2)), ["[0, 2]", "?version="]),
        (errors.BatchTooLarge(11, 10), ["11", "10"]),
        (errors.DimensionMismatch("weight", (2, 3), (3, 2)), ["weight", "(2, 3)", "(3, 2)"]),
        (errors.UnknownVersion(7), ["7"]),
        (errors.UnknownOperation("0f"), ["No operation '0f'; `backcast operations` lists"]),
        (errors.UnknownSnapshot("v1-a"), ["No snapshot 'v1-a'; `backcast snapshots` lists"]),
        (errors.UnknownId("user", "u1", "v2-a.3"), ["user", "'u1'", "v2-a.3"]),
        (errors.VersionNotPromoted(3, None, ()), ["Version 3", "live is nothing"]),
        (errors.VersionNotPromoted(3, 2, (2,)), ["Version 3", "live is version 2"]),
        (errors.VersionOffChain(2, 3, (0, 3), "rolled_back"), ["2", "rolled_back", "[0, 3]"]),
        (
            errors.VersionOffChain(2, 3, (0, 3), "rolled_back", "clicks fell"),
            ["2", '(rolled_back: "clicks fell")', "[0, 3]"],
        ),
        (
            errors.OperationRunning("0f", "promote", "load", 0.4, "a:1"),
            ["0f", "promote", "load", "40 %", "a:1"],
        ),
        (errors.OperationCancelled("0f", "ann", "clicks fell"), ["0f", 'by ann ("clicks fell");']),
        (errors.OperationCancelled("0f", "ann", None), ["Operation 0f was cancelled by ann; noth"]),
        (errors.IdempotencyKeyReused("morning", "0f"), ["'morning'", "0f"]),
        (errors.WeightsDeleted(0, "2026-11-20"), ["version 0", "2026-11-20", "KEEP_MODELS"]),
        (errors.NothingPublished(3), ["backcast publish 3"]),
        (
            errors.VersionInUse(
                0,
                pinned=[f"team {n}" for n in range(12)],
                used={"search": "2026-11-20"},
                sunset_at="2027-01-31T00:00:00+00:00",
            ),
            ["team 0, ", " and 2 more;", "search (last on 2026-11-20)", "until 2027-01-31T00"],
        ),
        (errors.VersionRetired(0, (1, 2)), ["Version 0 is retired; versions [1, 2] can be"]),
        (errors.VersionRetired(0, (), "too old"), ["Version 0 is retired (too old)."]),
        (errors.SnapshotMismatch("v1-a", "v1-b.2"), ["v1-a", "v1-b.2"]),
        (errors.Forbidden(Scope.ADMIN), ["scope admin."]),
        (errors.ArtifactMissing("s3://b/f"), ["s3://b/f"]),
        (errors.ArtifactUnwritable("s3://b/f", "no space"), ["s3://b/f", "no space"]),
        (errors.ArtifactCorrupt("s3://b/f", "truncated"), ["s3://b/f", "truncated"]),
        (errors.SnapshotNotLoaded("v1-a", "redis :1"), ["v1-a", "redis :1"]),
        (errors.SchemaMismatch(None, "0001"), ["absent", "0001", "backcast db upgrade"]),
        (errors.SchemaMismatch("0009", "0001"), ["0009", "0001", "backcast db upgrade"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_message_names_the_facts(error: BackcastError, facts: list[str]) -> None:
    assert [fact for fact in facts if fact not in error.message] == []


@pytest.mark.parametrize("cls", [errors.UnknownVersion, errors.VersionRetired])
def test_what_can_be_served_is_told_only_where_it_is_known(
    cls: type[errors.UnknownVersion | errors.VersionRetired],
) -> None:
    assert "servable_versions" not in cls(7, None).data
    assert cls(7, ()).data["servable_versions"] == []
    assert cls(7, (0, 2)).data["servable_versions"] == [0, 2]


def test_one_vector_is_spoken_of_as_one() -> None:
    message = errors.NotFinite(1, "item", "B1").message
    assert message == "1 vector holds NaN or infinite values; the first is that of item 'B1'."
