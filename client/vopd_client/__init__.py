"""The client of a vopd teacher: ask it for scores (`vopd_client.teacher`, no torch), or train a student with them."""
