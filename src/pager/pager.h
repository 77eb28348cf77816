/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The pager's work; see vmdir/pager.h for what it is. */
#ifndef LATENT_PAGER_PAGER_H
#define LATENT_PAGER_PAGER_H

#include "vmdir/pager.h"

#include <stdbool.h>

/* Until no VM has been there for some seconds. */
void pager_serve(int listener, const char *source, bool on_demand_only);

#endif
