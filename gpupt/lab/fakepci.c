/* Gives QEMU device types that are one of its own devices under other PCI ids.
 *
 * Preloaded into qemu-system-x86_64, which exports type_register_static() and has no
 * property for a device's vendor id.  Each entry of FAKE_PCI registers one subclass:
 *
 *   NAME=PARENT:VENDOR:DEVICE:NEWVENDOR:NEWDEVICE:NEWCLASS:NEWSUBVENDOR:NEWSUBDEVICE;...
 *
 * ids in hex; VENDOR:DEVICE are those the parent carries, by which the place of the ids in
 * the class structure is found: QEMU installs no header that says where it is.  A NAME that
 * begins with @ changes the parent as well: a type that QEMU makes by its own name, such as
 * the virtual functions of a device.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As include/qom/object.h has had it from QEMU 2.6 to 10.0. */
struct type_info {
	const char *name;
	const char *parent;
	size_t instance_size;
	size_t instance_align;
	void (*instance_init)(void *object);
	void (*instance_post_init)(void *object);
	void (*instance_finalize)(void *object);
	bool abstract;
	size_t class_size;
	void (*class_init)(void *klass, void *data);
	void (*class_base_init)(void *klass, void *data);
	void *class_data;
	void *interfaces;
};

/* As qom/object.c has had TypeImpl from QEMU 5.1 to 10.0. */
struct type_impl {
	const char *name;
	size_t class_size;
	size_t instance_size;
	size_t instance_align;
	void (*class_init)(void *klass, void *data);
	void (*class_base_init)(void *klass, void *data);
	void *class_data;
	void (*instance_init)(void *object);
	void (*instance_post_init)(void *object);
	void (*instance_finalize)(void *object);
	bool abstract;
	const char *parent;
	struct type_impl *parent_type;
	void *klass;
};

void *type_register_static(const struct type_info *info) __attribute__((weak));

struct disguise {
	char name[64], parent[64];
	unsigned vendor, device;
	unsigned new_vendor, new_device, new_class, new_subvendor, new_subdevice;
};

/* PCIDeviceClass holds vendor_id, device_id, revision (8 bits, padded), class_id,
 * subsystem_vendor_id, subsystem_id: six 16-bit words in a row.  The class structure is a
 * few hundred bytes long, and its copy of the parent's ids occurs in it once. */
enum { WORDS_SEARCHED = 400 };

static void change_ids(void *klass, const struct disguise *wanted)
{
	uint16_t *word = klass;

	for (int i = 0; i < WORDS_SEARCHED; i++) {
		if (word[i] != wanted->vendor || word[i + 1] != wanted->device)
			continue;
		word[i] = (uint16_t)wanted->new_vendor;
		word[i + 1] = (uint16_t)wanted->new_device;
		word[i + 3] = (uint16_t)wanted->new_class;
		word[i + 4] = (uint16_t)wanted->new_subvendor;
		word[i + 5] = (uint16_t)wanted->new_subdevice;
		return;
	}
	fprintf(stderr, "fakepci: %s is no %04x:%04x\n", wanted->parent, wanted->vendor,
		wanted->device);
	exit(1);
}

/* A class begins with its type.  The parent's class is whole before this one's is begun. */
static void disguise_class(void *klass, void *data)
{
	const struct disguise *wanted = data;
	struct type_impl *type = *(struct type_impl **)klass;

	change_ids(klass, wanted);
	if (wanted->name[0] != '@')
		return;
	if (strcmp(type->name, wanted->name + 1) != 0 || strcmp(type->parent, wanted->parent) != 0 ||
	    strcmp(type->parent_type->name, wanted->parent) != 0) {
		fprintf(stderr, "fakepci: this QEMU keeps its types in another form\n");
		exit(1);
	}
	change_ids(type->parent_type->klass, wanted);
}

__attribute__((constructor)) static void register_disguises(void)
{
	const char *entry = getenv("FAKE_PCI");

	if (entry == NULL || type_register_static == NULL)
		return;
	while (*entry != '\0') {
		struct disguise *read = calloc(1, sizeof *read);
		struct type_info *type = calloc(1, sizeof *type);
		const char *end = strchr(entry, ';');

		if (read == NULL || type == NULL ||
		    sscanf(entry, "%63[^=]=%63[^:]:%x:%x:%x:%x:%x:%x:%x", read->name,
			   read->parent, &read->vendor, &read->device, &read->new_vendor,
			   &read->new_device, &read->new_class, &read->new_subvendor,
			   &read->new_subdevice) != 9) {
			fprintf(stderr, "fakepci: cannot read %s\n", entry);
			exit(1);
		}
		type->name = read->name + (read->name[0] == '@');
		type->parent = read->parent;
		type->class_init = disguise_class;
		type->class_data = read;
		type_register_static(type);
		entry = end == NULL ? "" : end + 1;
	}
}
