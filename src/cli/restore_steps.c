/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/restore_steps.h"

struct json_object *restore_steps_to_json(const uint64_t step_us[RESTORE_STEPS])
{
	static const char *const names[RESTORE_STEPS] = { "begun", "checks", "overlays", "exec", "ram", "state", "resumed", "rest" };
	struct json_object *steps = json_object_new_array();

	for (int i = 1; i < RESTORE_STEPS; i++) {
		struct json_object *step;

		if (!step_us[i])
			continue;
		step = json_object_new_object();
		json_object_object_add(step, "step", json_object_new_string(names[i]));
		json_object_object_add(step, "us", json_object_new_uint64(step_us[i] - step_us[RESTORE_BEGUN]));
		json_object_array_add(steps, step);
	}
	return steps;
}
