"""Pictures and figures of what is trained on, before and after."""
