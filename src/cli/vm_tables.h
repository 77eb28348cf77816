/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The page entries of a running VM (core/entry.h), read from the tables that its agent shares. They
 * change while they are read. The agent is not trusted (vm_view.h): entries may be anything, their
 * number is what it should be.
 */
#ifndef LATENT_CLI_VM_TABLES_H
#define LATENT_CLI_VM_TABLES_H

#include "cli/vm_view.h"
#include "core/ram.h"

struct vm_tables {
	unsigned blocks;
	struct vm_table {
		char name[RAM_NAME_BYTES]; /* plain text */
		uint64_t pages;            /* 1 .. ENTRY_FILE_PAGES */
		int fd;
	} block[RAM_BLOCKS];
};

/* Asks the agent for them. Prints the sentence and returns an exit status on failure. */
int vm_tables_open(const struct vm_view *view, struct vm_tables *ret_tables);
void vm_tables_close(struct vm_tables *tables);

#endif
