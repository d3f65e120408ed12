def ensure_kernel():
    return "no"


def argv():
    pass
