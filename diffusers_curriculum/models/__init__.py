"""Networks, autoencoders and latent spaces; small real models, built from configs."""
