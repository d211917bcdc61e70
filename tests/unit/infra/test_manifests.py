"""Every manifest against its published schema; the Dockerfile through its linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

INFRA = Path(__file__).parents[3] / "infra"
K8S = INFRA / "k8s"
BIN = Path(sys.executable).parent

# The fields of KEDA's and kustomize's kinds that we use (keda.sh/docs, CRD v1alpha1; kustomize's kustomization reference):
# a misspelt field is refused here as the cluster would refuse it.
CUSTOM_SCHEMAS: dict[tuple[str, str], dict[str, Any]] = {
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}},
                "additionalProperties": False,
            },
            "minReplicaCount": {"type": "integer", "minimum": 0},
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "pollingInterval": {"type": "integer", "minimum": 1},
            "cooldownPeriod": {"type": "integer", "minimum": 0},
            "advanced": {"type": "object"},
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["type", "metadata"],
                    "additionalProperties": False,
                    "properties": {
                        "type": {"const": "postgresql"},
                        "authenticationRef": {"type": "object", "required": ["name"]},
                        "metadata": {
                            "type": "object",
                            "required": ["query", "targetQueryValue"],
                            # Trigger metadata are strings, always: an unquoted number is the usual mistake.
                            "additionalProperties": {"type": "string"},
                        },
                    },
                },
            },
        },
    },
    ("keda.sh/v1alpha1", "TriggerAuthentication"): {
        "type": "object",
        "required": ["secretTargetRef"],
        "additionalProperties": False,
        "properties": {
            "secretTargetRef": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["parameter", "name", "key"],
                    "additionalProperties": False,
                    "properties": {name: {"type": "string"} for name in ("parameter", "name", "key")},
                },
            }
        },
    },
}


def _documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.parent.name}/{path.name}:{document['kind']}:{document['metadata']['name']}")
        for path in sorted(K8S.rglob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


@pytest.mark.parametrize("document", _documents())
def test_kubernetes_manifest_matches_its_schema(document: dict[str, Any]) -> None:
    schema = CUSTOM_SCHEMAS.get((document["apiVersion"], document["kind"]))
    if schema is not None:
        jsonschema.validate(document["spec"], schema)
    else:
        kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("path", sorted(K8S.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomization_names_files_that_exist(path: Path) -> None:
    kustomization = yaml.safe_load(path.read_text())
    assert kustomization["kind"] == "Kustomization"
    for resource in kustomization["resources"]:
        assert (path.parent / resource).exists(), resource
    listed = set(kustomization["resources"])
    beside = {other.name for other in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
    assert beside <= listed, "a manifest that no kustomization lists is never applied"


def test_every_container_is_locked_down() -> None:
    for parameter in _documents():
        (document,) = parameter.values
        pod = document.get("spec", {}).get("template", {}).get("spec")
        if pod is None:
            continue
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]


def test_compose_file_matches_the_compose_specification() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose" / "compose.yaml"]
    subprocess.run(command, check=True, capture_output=True)


def test_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([BIN / "hadolint", INFRA / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_images_are_not_root_and_the_service_image_has_no_torch() -> None:
    stages = (INFRA / "docker" / "Dockerfile").read_text().split("\nFROM ")
    by_name = {stage.splitlines()[0].split(" AS ")[-1]: stage for stage in stages}
    assert "USER 10001:10001" in by_name["runtime"]
    for name in ("service", "worker-cpu", "worker-cuda"):
        assert by_name[name].startswith("runtime AS"), "built on the non-root stage"
        assert "USER" not in by_name[name]
    assert "torch" not in by_name["build-service"]
    assert "engine]" not in by_name["build-service"]
