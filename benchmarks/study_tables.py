"""Tables of the study from results/ alone: stub."""


def everything(folder) -> str:
    return ""
