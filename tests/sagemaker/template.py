"""Reads the CloudFormation template as CloudFormation does: evaluates conditions, references and substitutions."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.sagemaker.training_job import ROOT

TEMPLATE = ROOT / "infra/sagemaker/template.yaml"
PSEUDO = {"AWS::AccountId": "123456789012", "AWS::Region": "us-east-1", "AWS::Partition": "aws"}
BUCKET = "made-up-bucket"
# What CloudFormation would name the resources, and their attributes.
MADE = {
    "Bucket": BUCKET,
    "Bucket.Arn": f"arn:aws:s3:::{BUCKET}",
    "Repository.Arn": "arn:aws:ecr:us-east-1:123456789012:repository/qlora-job",
    "Repository.RepositoryUri": "123456789012.dkr.ecr.us-east-1.amazonaws.com/qlora-job",
    "Role": "made-up-role",
    "Role.Arn": "arn:aws:iam::123456789012:role/made-up-role",
}


class Loader(yaml.SafeLoader):
    """Reads `!Sub x` as {"Sub": x}."""


def _function(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.SequenceNode):
        return {name: loader.construct_sequence(node, deep=True)}
    return {name: loader.construct_scalar(node)}  # type: ignore[arg-type]


Loader.add_multi_constructor("!", _function)


class Stack:
    """The template with these parameters: properties by resource, and outputs."""

    def __init__(self, **parameters: str) -> None:
        tree = yaml.load(TEMPLATE.read_text(encoding="utf-8"), Loader)
        defaults = {name: str(declared["Default"]) for name, declared in tree["Parameters"].items()}
        assert parameters.keys() <= defaults.keys()
        self._values = {**PSEUDO, **MADE, **defaults, **parameters}
        self._conditions: dict[str, bool] = {}
        for name, condition in tree["Conditions"].items():
            self._conditions[name] = self._resolve(condition)
        self.resources = {name: self._resolve(there["Properties"]) for name, there in self._present(tree["Resources"])}
        self.outputs = {name: self._resolve(there["Value"]) for name, there in self._present(tree["Outputs"])}

    def _present(self, entries: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(name, entry) for name, entry in entries.items() if self._conditions.get(entry.get("Condition"), True)]

    def _resolve(self, value: Any) -> Any:  # noqa: PLR0911 - one for each of CloudFormation's functions
        match value:
            case {"Ref": name} | {"GetAtt": name} if len(value) == 1:
                return self._values[name]
            case {"Sub": text}:
                return re.sub(r"\$\{([^}]+)\}", lambda found: self._values[found[1]], text)
            case {"If": [name, yes, no]}:
                return self._resolve(yes if self._conditions[name] else no)
            case {"Equals": [one, other]}:
                return self._resolve(one) == self._resolve(other)
            case {"Not": [condition]}:
                return not self._resolve(condition)
            case dict():
                return {key: self._resolve(part) for key, part in value.items()}
            case list():
                return [self._resolve(part) for part in value]
        return value

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """The role's, by name."""
        apart = [properties for properties in self.resources.values() if properties.get("Roles") == [MADE["Role"]]]
        found = [*self.resources["Role"]["Policies"], *apart]
        return {policy["PolicyName"]: policy["PolicyDocument"] for policy in found}

    @property
    def statements(self) -> list[dict[str, Any]]:
        """The statements of the role's policies, with actions and resources as lists."""
        return [
            {**statement, "Action": _listed(statement["Action"]), "Resource": _listed(statement["Resource"])}
            for policy in self.policies.values()
            for statement in policy["Statement"]
        ]

    def allowed(self, service: str) -> dict[str, set[str]]:
        """Action -> resources, of one service."""
        result: dict[str, set[str]] = {}
        for statement in self.statements:
            for action in statement["Action"]:
                if action.startswith(f"{service}:"):
                    result.setdefault(action, set()).update(statement["Resource"])
        return result


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
