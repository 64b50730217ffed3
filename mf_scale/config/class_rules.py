"""Rules of what is done by class: long tails, text embeddings. Pure; see `validate.py`."""

from __future__ import annotations

from mf_scale.config.schema import Config, LossConfig

_OF_BALANCE = {
    "seesaw": ("seesaw_p", "seesaw_q"),
    "equalisation": ("equalisation_images", "equalisation_share"),
}


def _long_tail(config: Config) -> list[str]:
    loss, fresh, broken = config.loss, LossConfig(), []
    for balance, names in _OF_BALANCE.items():
        inert = [
            name for name in names if loss.class_balance != balance and getattr(loss, name) != getattr(fresh, name)
        ]
        broken += [
            f"loss.{name} = {getattr(loss, name)} does nothing with loss.class_balance = {loss.class_balance}"
            for name in inert
        ]
    for name in ("seesaw_p", "seesaw_q", "equalisation_images"):
        if getattr(loss, name) < 0:
            broken.append(f"loss.{name} = {getattr(loss, name)} must not be negative")
    if not 0 <= loss.equalisation_share <= 1:
        broken.append(f"loss.equalisation_share = {loss.equalisation_share} must lie in 0..1")
    if loss.class_balance != "none" and config.model.kind != "mask_classification":
        broken.append(
            f"loss.class_balance = {loss.class_balance} is of the class loss of queries: it needs "
            f"model.kind = mask_classification, not {config.model.kind}"
        )
    if config.eval.logit_adjustment < 0:
        broken.append(f"eval.logit_adjustment = {config.eval.logit_adjustment} must not be negative")
    return broken


def _class_embeddings(config: Config) -> list[str]:
    path = config.model.class_embeddings
    if path is None:
        return []
    if not path.strip():
        return ["model.class_embeddings is empty"]
    if path.startswith("~"):
        return [f"model.class_embeddings = {path}: ~ is not expanded here, write the whole path"]
    if config.model.kind != "mask_classification":
        return [
            f"model.class_embeddings is the class head of queries: it needs model.kind = mask_classification, not "
            f"{config.model.kind}"
        ]
    return []


CLASS_RULES = (_long_tail, _class_embeddings)
