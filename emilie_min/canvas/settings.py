"""What an edit may be asked for. Nothing here needs PyTorch."""

GATES = ("anchor", "eq8", "guidance")  # what a mask does
RESCALES = ("paper", "signed", "exact", "none")  # how f is found
ITERATES = ("latent", "image")  # what the next edit starts from
SAMPLERS = ("euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
