"""Object insertion (Sec. 6.1): GracoNet says where, BLIP-2 what, EMILIE draws it there."""
