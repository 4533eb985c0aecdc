# swap.sh FORM: swap on a device of that form, under a program that needs more memory than the
# guest has.
. "$LAB_SCRIPTS/lib.sh"
