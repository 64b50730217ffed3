"""Unified vocabularies: declared equivalences of several sources' classes -> one vocabulary and a map a source."""

from mf_scale.unify.counts import unified_counts, with_bands
from mf_scale.unify.federated import unified_federation
from mf_scale.unify.merge import LEFT_OUT, Unified, UnifiedSource, unify
from mf_scale.unify.placing import place
from mf_scale.unify.statements import Source
from mf_scale.unify.tables import MergeTable, check_source, read_map
from mf_scale.unify.words import describe, whole_text

__all__ = [
    "LEFT_OUT",
    "MergeTable",
    "Source",
    "Unified",
    "UnifiedSource",
    "check_source",
    "describe",
    "place",
    "read_map",
    "unified_counts",
    "unified_federation",
    "unify",
    "whole_text",
    "with_bands",
]
