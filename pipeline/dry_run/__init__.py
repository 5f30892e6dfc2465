"""`--dry_run`: memory, disk, hours and every mistake of a recipe, before anything is trained."""
