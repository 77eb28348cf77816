/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/top_list.h"

#include "activity/states.h"
#include "cli/cli.h"
#include "cli/vm_view.h"
#include "os/os.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096

/* ---- figures ------------------------------------------------------------------------------------ */

/* Clock ticks that the process has had the processor for; TOP_UNKNOWN: it is gone. */
static uint64_t cpu_ticks(uint32_t pid)
{
	char path[32], text[1024];
	unsigned long long user, system;
	const char *after;
	FILE *file;
	size_t n;

	snprintf(path, sizeof path, "/proc/%u/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return TOP_UNKNOWN;
	n = fread(text, 1, sizeof text - 1, file);
	fclose(file);
	text[n] = '\0';
	after = strrchr(text, ')'); /* the command's name may hold anything */
	if (!after || sscanf(after + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user,
			     &system) != 2)
		return TOP_UNKNOWN;
	return user + system;
}

static void rate_cpu(struct top_vm *vm, const struct top_vm *before)
{
	double seconds;

	vm->cpu_us_at = os_now_us();
	vm->cpu_ticks = vm->pid ? cpu_ticks(vm->pid) : TOP_UNKNOWN;
	if (!before || vm->cpu_ticks == TOP_UNKNOWN || vm->cpu_ticks < before->cpu_ticks)
		return;
	seconds = (double)(vm->cpu_us_at - before->cpu_us_at) / 1e6;
	if (seconds > 0)
		vm->cpu_percent = 100 * (double)(vm->cpu_ticks - before->cpu_ticks) /
				  (double)sysconf(_SC_CLK_TCK) / seconds;
}

/* Counts are published at the end of a pass: a rate is that between two such ends. */
static void rate_refaults(struct top_vm *vm, const struct vm_stats *stats, const struct top_vm *before)
{
	vm->passes = stat_get(&stats->scan.passes);
	vm->refaults = stat_get(&stats->scan.refaults);
	vm->pass_us_at = os_now_us();
	if (!before)
		return;
	if (vm->passes == before->passes) {
		vm->refaults_per_s = before->refaults_per_s;
		vm->pass_us_at = before->pass_us_at;
	} else if (before->passes && vm->refaults >= before->refaults &&
		   vm->pass_us_at > before->pass_us_at) {
		vm->refaults_per_s = (double)(vm->refaults - before->refaults) /
				     ((double)(vm->pass_us_at - before->pass_us_at) / 1e6);
	}
}

static void take_scan(struct top_vm *vm, const struct scan_stats *scan)
{
	uint64_t period_us = stat_get(&scan->period_us_now);

	if (!stat_get(&scan->passes))
		return;
	vm->hot_pages = stat_get(&scan->pages_now[CLASS_HOT]);
	vm->warm_pages = stat_get(&scan->pages_now[CLASS_WARM]) + stat_get(&scan->pages_now[CLASS_COOL]);
	vm->cold_pages =
		stat_get(&scan->pages_now[CLASS_COLD]) + stat_get(&scan->pages_now[CLASS_FROZEN]);
	vm->used_10s_pages = stat_get(&scan->in_use_now[0]);
	vm->used_1m_pages = stat_get(&scan->in_use_now[1]);
	if (period_us)
		vm->scan_percent =
			100 * (double)stat_get(&scan->pass_cpu_ns_now) / ((double)period_us * 1e3);
}

static void take_stats(struct top_vm *vm, const struct vm_stats *stats)
{
	uint64_t base = stat_get(&stats->pages_base_now);

	vm->pid = stats->pid;
	vm->ram_bytes = stats->ram_bytes;
	vm->masked_pages = stat_get(&stats->pages_masked_now);
	vm->base_pages = base > vm->masked_pages ? base - vm->masked_pages : 0; /* read at two moments */
	vm->overlay_pages = vm_view_clean_pages(stats);
	vm->private_pages = stat_get(&stats->pages_private_now);
	take_scan(vm, &stats->scan);
}

static const struct top_vm *find(const struct top_list *list, const char *name, uint32_t pid)
{
	for (size_t i = 0; i < list->count; i++)
		if (!strcmp(list->vm[i].name, name) && list->vm[i].pid == pid)
			return &list->vm[i];
	return NULL;
}

struct update {
	const struct top_list *old;
	struct top_vm *vm;
	size_t count;
};

static int add(void *ctx, const char *name)
{
	struct top_vm vm = { .ram_bytes = TOP_UNKNOWN,
			     .base_pages = TOP_UNKNOWN,
			     .overlay_pages = TOP_UNKNOWN,
			     .private_pages = TOP_UNKNOWN,
			     .masked_pages = TOP_UNKNOWN,
			     .hot_pages = TOP_UNKNOWN,
			     .warm_pages = TOP_UNKNOWN,
			     .cold_pages = TOP_UNKNOWN,
			     .used_10s_pages = TOP_UNKNOWN,
			     .used_1m_pages = TOP_UNKNOWN,
			     .cpu_percent = NAN,
			     .scan_percent = NAN,
			     .refaults_per_s = NAN };
	struct update *update = ctx;
	struct top_vm *grown;
	struct vm_view view;
	int r = vm_view_open(update->old->root, name, &view);

	if (r == -ENOENT) /* it went this moment */
		return 0;
	snprintf(vm.name, sizeof vm.name, "%s", name);
	if (!r) {
		const struct top_vm *before = find(update->old, name, view.stats.pid);

		if (view.stats.magic)
			take_stats(&vm, &view.stats);
		rate_cpu(&vm, before);
		rate_refaults(&vm, &view.stats, before);
		vm_view_close(&view);
	}
	grown = realloc(update->vm, (update->count + 1) * sizeof *grown);
	if (!grown)
		return -ENOMEM;
	update->vm = grown;
	update->vm[update->count++] = vm;
	return 0;
}

int top_list_update(struct top_list *list, char why[VMDIR_WHY_BYTES])
{
	struct update update = { .old = list };
	int r = vmdir_root(false, list->root, why);

	if (r && r != -ENOENT)
		return r;
	if (!r)
		r = vmdir_for_each(list->root, add, &update);
	if (r && r != -ENOENT) {
		snprintf(why, VMDIR_WHY_BYTES, "the run directory %s cannot be read: %s", list->root,
			 strerror(-r));
		free(update.vm);
		return r;
	}
	free(list->vm);
	list->vm = update.vm;
	list->count = update.count;
	top_list_sort(list);
	return 0;
}

void top_list_free(struct top_list *list)
{
	free(list->vm);
	list->vm = NULL;
	list->count = 0;
}

/* ---- order -------------------------------------------------------------------------------------- */

static double weight(const struct top_vm *vm, enum top_order order)
{
	switch (order) {
	case TOP_BY_CPU:
		return isnan(vm->cpu_percent) ? -1 : vm->cpu_percent;
	case TOP_BY_MEMORY:
		return vm->ram_bytes == TOP_UNKNOWN ? -1 : (double)vm->ram_bytes;
	default:
		return vm->pid;
	}
}

static int compare(const void *a, const void *b, void *order)
{
	double left = weight(a, *(enum top_order *)order), right = weight(b, *(enum top_order *)order);

	if (left != right)
		return left < right ? 1 : -1;
	return strcmp(((const struct top_vm *)a)->name, ((const struct top_vm *)b)->name);
}

void top_list_sort(struct top_list *list)
{
	if (list->count)
		qsort_r(list->vm, list->count, sizeof *list->vm, compare, &list->order);
}

/* ---- text --------------------------------------------------------------------------------------- */

#define CELL_BYTES 12

/* Four characters: "1.5G", "512M". */
static void scaled(double value, double step, const char *units, char text[CELL_BYTES])
{
	while (value >= 999.5 && units[1]) {
		value /= step;
		units++;
	}
	snprintf(text, CELL_BYTES, value < 9.95 ? "%.1f%c" : "%.0f%c",
		 value < 1e6 ? value : 999999.0, *units);
}

static void print_bytes(uint64_t bytes, char text[CELL_BYTES])
{
	scaled((double)bytes / 1024, 1024, "KMGTPE", text);
}

static void print_pages(uint64_t pages, char text[CELL_BYTES])
{
	if (!pages || pages == TOP_UNKNOWN)
		snprintf(text, CELL_BYTES, "%s", pages ? "-" : "0");
	else
		print_bytes(pages * PAGE_BYTES, text);
}

static void print_percent(double percent, char text[CELL_BYTES])
{
	if (isnan(percent))
		snprintf(text, CELL_BYTES, "-");
	else
		snprintf(text, CELL_BYTES, percent < 99.95 ? "%.1f" : "%.0f",
			 percent < 1e6 ? percent : 999999.0);
}

static void print_rate(double rate, char text[CELL_BYTES])
{
	if (isnan(rate))
		snprintf(text, CELL_BYTES, "-");
	else if (rate < 999.5)
		snprintf(text, CELL_BYTES, "%.0f", rate);
	else
		scaled(rate / 1000, 1000, "kMGTPE", text);
}

enum figure {
	PID,
	CPU,
	RAM,
	BASE,
	OVERLAY,
	PRIVATE,
	MASKED,
	HOT,
	WARM,
	COLD,
	USED_10S,
	USED_1M,
	REFAULTS,
	SCAN,
	FIGURES
};

static const struct {
	const char *title;
	unsigned columns; /* with the space before it */
} figures[FIGURES] = {
	[PID] = { "PID", 8 },       [CPU] = { "%CPU", 5 },      [RAM] = { "RAM", 5 },
	[BASE] = { "BASE", 5 },     [OVERLAY] = { "OVL", 5 },   [PRIVATE] = { "PRIV", 5 },
	[MASKED] = { "MASK", 5 },   [HOT] = { "HOT", 5 },       [WARM] = { "WARM", 5 },
	[COLD] = { "COLD", 5 },     [USED_10S] = { "WS10", 5 }, [USED_1M] = { "WS1M", 5 },
	[REFAULTS] = { "RF/S", 5 }, [SCAN] = { "SCAN", 5 },
};

/* What goes first where there is no room. */
static const enum figure dispensable[] = {
	MASKED, PID, USED_1M, REFAULTS, SCAN, PRIVATE, OVERLAY, BASE
};

static void print_figure(const struct top_vm *vm, enum figure figure, char text[CELL_BYTES])
{
	const uint64_t pages[FIGURES] = {
		[BASE] = vm->base_pages,       [OVERLAY] = vm->overlay_pages,
		[PRIVATE] = vm->private_pages, [MASKED] = vm->masked_pages,
		[HOT] = vm->hot_pages,         [WARM] = vm->warm_pages,
		[COLD] = vm->cold_pages,       [USED_10S] = vm->used_10s_pages,
		[USED_1M] = vm->used_1m_pages,
	};

	if (figure == PID && vm->pid)
		snprintf(text, CELL_BYTES, "%u", vm->pid);
	else if (figure == CPU)
		print_percent(vm->cpu_percent, text);
	else if (figure == SCAN)
		print_percent(vm->scan_percent, text);
	else if (figure == REFAULTS)
		print_rate(vm->refaults_per_s, text);
	else if (figure == RAM && vm->ram_bytes != TOP_UNKNOWN)
		print_bytes(vm->ram_bytes, text);
	else
		print_pages(figure == PID || figure == RAM ? TOP_UNKNOWN : pages[figure], text);
}

static unsigned figure_columns(uint32_t shown)
{
	unsigned columns = 0;

	for (unsigned i = 0; i < FIGURES; i++)
		columns += shown >> i & 1 ? figures[i].columns : 0;
	return columns;
}

struct top_layout top_lay_out(const struct top_list *list, unsigned columns)
{
	struct top_layout layout = { TOP_NAME_MIN, (1u << FIGURES) - 1 };
	size_t longest = TOP_NAME_MIN;
	unsigned used;

	for (unsigned i = 0; i < sizeof dispensable / sizeof dispensable[0]; i++)
		if (figure_columns(layout.shown) + TOP_NAME_MIN > columns)
			layout.shown &= ~(1u << dispensable[i]);
	for (size_t i = 0; i < list->count; i++)
		longest = strlen(list->vm[i].name) > longest ? strlen(list->vm[i].name) : longest;
	used = figure_columns(layout.shown);
	if (columns > used + TOP_NAME_MIN)
		layout.name_columns = longest < columns - used ? (unsigned)longest : columns - used;
	return layout;
}

void top_line(const struct top_layout *layout, const struct top_vm *vm, char text[TOP_LINE_BYTES])
{
	const char *name = vm ? vm->name : "NAME";
	int columns = (int)layout->name_columns,
	    used = snprintf(text, TOP_LINE_BYTES, "%-*.*s", columns, columns, name);
	char cell[CELL_BYTES];

	if (strlen(name) > layout->name_columns)
		text[layout->name_columns - 1] = '+';
	for (unsigned i = 0; i < FIGURES; i++) {
		if (!(layout->shown >> i & 1))
			continue;
		if (vm)
			print_figure(vm, i, cell);
		used += snprintf(text + used, (size_t)(TOP_LINE_BYTES - used), " %*s",
				 (int)figures[i].columns - 1, vm ? cell : figures[i].title);
	}
}

void top_summary(const struct top_list *list, char text[TOP_LINE_BYTES])
{
	char ram[CLI_SIZE_TEXT], hot[CLI_SIZE_TEXT], clock[16] = "";
	uint64_t ram_bytes = 0, hot_pages = 0;
	time_t now = time(NULL);
	struct tm tm;

	for (size_t i = 0; i < list->count; i++) {
		ram_bytes += list->vm[i].ram_bytes == TOP_UNKNOWN ? 0 : list->vm[i].ram_bytes;
		hot_pages += list->vm[i].hot_pages == TOP_UNKNOWN ? 0 : list->vm[i].hot_pages;
	}
	if (localtime_r(&now, &tm))
		strftime(clock, sizeof clock, "%H:%M:%S", &tm);
	snprintf(text, TOP_LINE_BYTES, "latent top - %s, %zu %s, RAM %s, hot %s", clock, list->count,
		 list->count == 1 ? "VM" : "VMs", cli_size(ram_bytes, ram),
		 cli_size(hot_pages * PAGE_BYTES, hot));
}
