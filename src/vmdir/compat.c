/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vmdir/compat.h"

#include <fnmatch.h>
#include <stdio.h>
#include <strings.h>

#define BOTH (COMPAT_OVERLAYS | COMPAT_MASKS)

#define OTHER_PROCESS                                                                                   \
	"another process maps guest RAM from its one file and would miss what is mapped over it"
#define PINNED "its DMA goes on to the pages that were there when guest RAM was pinned"
#define ENCRYPTED "the processor encrypts guest RAM, so a page of an image means nothing to the guest"
#define LOCKED "locked memory turns every page of an image into a private copy at once"
#define NINE_P "its reads into guest RAM go on while the guest is stopped, and its files are the guest's to cut"
#define POSTCOPY "it puts guest RAM under a userfaultfd of QEMU's own"

static const struct compat_rule rules[] = {
	{ COMPAT_DEVICE, "vhost-user-*", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_DEVICE, "vfio-*", NULL, BOTH, PINNED },
	{ COMPAT_DEVICE, "vhost-vdpa-*", NULL, BOTH, PINNED },
	{ COMPAT_DEVICE, "pvrdma", NULL, BOTH, PINNED },
	{ COMPAT_DEVICE, "virtio-gpu*", "blob", COMPAT_OVERLAYS,
	  "blob resources (udmabuf) take pages from the one file behind guest RAM" },
	{ COMPAT_DEVICE, "virtio-vga*", "blob", COMPAT_OVERLAYS,
	  "blob resources (udmabuf) take pages from the one file behind guest RAM" },
	{ COMPAT_DEVICE, "x-pci-proxy-dev", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },

	{ COMPAT_NETDEV, "vhost-user", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_NETDEV, "vhost-vdpa", NULL, BOTH, PINNED },

	{ COMPAT_FSDEV, "*", NULL, COMPAT_OVERLAYS, NINE_P },

	{ COMPAT_OBJECT, "sev-*", NULL, BOTH, ENCRYPTED },
	{ COMPAT_OBJECT, "tdx-guest", NULL, BOTH, ENCRYPTED },
	{ COMPAT_OBJECT, "cryptodev-vhost-user", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_OBJECT, "vhost-user-backend", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_OBJECT, "x-vfio-user-server", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_OBJECT, "memory-backend-epc", NULL, BOTH,
	  "enclaves keep pages that only the processor can read" },

	{ COMPAT_BLOCKDEV, "nvme", NULL, BOTH, PINNED }, /* the block driver on VFIO, not the device */
	{ COMPAT_BLOCKDEV, "nvme-io_uring", NULL, BOTH, PINNED },
	{ COMPAT_BLOCKDEV, "virtio-blk-vfio-pci", NULL, BOTH, PINNED },
	{ COMPAT_BLOCKDEV, "virtio-blk-vhost-vdpa", NULL, BOTH, PINNED },
	{ COMPAT_BLOCKDEV, "virtio-blk-vhost-user", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },

	{ COMPAT_MACHINE, "x-remote", NULL, COMPAT_OVERLAYS, OTHER_PROCESS },
	{ COMPAT_MACHINE, "*", "confidential-guest-support", BOTH, ENCRYPTED },
	{ COMPAT_MACHINE, "*", "memory-encryption", BOTH, ENCRYPTED },

	{ COMPAT_OVERCOMMIT, "*", "mem-lock", BOTH, LOCKED },

	{ COMPAT_MIGRATION, "rdma", NULL, BOTH, PINNED },

	{ COMPAT_FILE, "/dev/vfio/*", NULL, BOTH, PINNED },
	{ COMPAT_FILE, "/dev/iommu", NULL, BOTH, PINNED },
	{ COMPAT_FILE, "/dev/vhost-vdpa-*", NULL, BOTH, PINNED },
	{ COMPAT_FILE, "/dev/infiniband/*", NULL, BOTH, PINNED },
	{ COMPAT_FILE, "/dev/udmabuf", NULL, COMPAT_OVERLAYS,
	  "it takes pages from the one file behind guest RAM" },
	{ COMPAT_FILE, "/dev/sev", NULL, BOTH, ENCRYPTED },
	{ COMPAT_FILE, "/dev/userfaultfd", NULL, BOTH, POSTCOPY },
};

static bool is_set(const char *value);

const struct compat_rule *compat_find(enum compat_subject subject, const char *name,
				      compat_property property, void *ctx)
{
	for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
		const struct compat_rule *rule = &rules[i];

		if (rule->subject != subject || fnmatch(rule->name, name, 0))
			continue;
		if (!rule->property || (property && is_set(property(ctx, rule->property))))
			return rule;
	}
	return NULL;
}

void compat_sentence(const struct compat_rule *rule, const char *name, char *text, size_t bytes)
{
	snprintf(text, bytes, "%.40s: %s", rule->property ? rule->property : name, rule->why);
}

/* QEMU's words for "off", and the empty ones. */
static bool is_set(const char *value)
{
	static const char *const off[] = { "off", "no", "false", "n", "" };

	for (size_t i = 0; value && i < sizeof off / sizeof off[0]; i++)
		if (!strcasecmp(value, off[i]))
			return false;
	return value;
}
