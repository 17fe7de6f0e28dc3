"""Reading SAEs that others have saved or published: formats, checks, widths that their files lack."""
