/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent top on a terminal. Signals that end a program only note that; the loop sees it within a moment,
 * and there is one way out, which gives the terminal back.
 */
#include "cli/top_list.h"

#include "cli/cli.h"
#include "cli/vm_view.h"
#include "os/os.h"

#include <curses.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ESCAPE 27
#define FIRST_ROW 3
#define MESSAGE_ROW 1
#define ESCAPE_MS 50
#define ANSWER_TIMEOUT_MS 2000

static const char *const help[] = {
	"Keys of latent top:",
	"",
	"  q        quit",
	"  h, ?     this",
	"  Up, Down select a VM",
	"  P        sort by processor time (%CPU)",
	"  M        sort by memory (RAM)",
	"  N        sort by process id (PID)",
	"  d        change the delay",
	"  s        change the period at which the selected VM's memory is looked at",
	"  Space    show it anew now",
	"",
	"BASE, OVL, PRIV, MASK: its own memory, pages of images, copies of those, pages to",
	"be made when touched. HOT, WARM, COLD: by use (latent scan). WS10, WS1M: used",
	"within 10 s, 1 min. RF/S: pages brought back a second. SCAN: its cost, in % of a CPU.",
	"",
	"Press any key.",
};

static volatile sig_atomic_t ended;

struct screen {
	struct top_list *list;
	double delay_s;
	uint64_t due_us;
	char selected[VMDIR_NAME_BYTES]; /* by name, for rows move */
	size_t first;                    /* the VM in the first row */
	char message[VMDIR_WHY_BYTES];   /* until the next key */
};

static void note_end(int signal)
{
	(void)signal;
	ended = 1;
}

static void catch_signals(void)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
	struct sigaction action = { .sa_handler = note_end };

	for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
		sigaction(signals[i], &action, NULL);
}

/* ---- what is shown ------------------------------------------------------------------------------ */

static size_t selected_row(struct screen *s)
{
	for (size_t i = 0; i < s->list->count; i++)
		if (!strcmp(s->list->vm[i].name, s->selected))
			return i;
	return 0;
}

static void select_row(struct screen *s, size_t row)
{
	s->selected[0] = '\0';
	if (row < s->list->count)
		memcpy(s->selected, s->list->vm[row].name, sizeof s->selected);
}

static void put(int row, const char *text, bool reversed)
{
	if (row >= LINES)
		return;
	if (reversed)
		attron(A_REVERSE);
	mvaddnstr(row, 0, text, COLS);
	if (reversed) {
		int x = getcurx(stdscr);

		if (getcury(stdscr) == row)
			hline(' ' | A_REVERSE, COLS - x);
		attroff(A_REVERSE);
	}
}

static void draw(struct screen *s)
{
	struct top_layout layout = top_lay_out(s->list, (unsigned)COLS);
	size_t rows = LINES > FIRST_ROW ? (size_t)(LINES - FIRST_ROW) : 1, selected = selected_row(s);
	char text[TOP_LINE_BYTES];

	select_row(s, selected); /* if it is gone, another is */
	if (selected < s->first)
		s->first = selected;
	else if (selected >= s->first + rows)
		s->first = selected - rows + 1;
	erase();
	top_summary(s->list, text);
	put(0, text, false);
	put(MESSAGE_ROW, s->message, false);
	top_line(&layout, NULL, text);
	put(FIRST_ROW - 1, text, true);
	for (size_t i = 0; i < rows && s->first + i < s->list->count; i++) {
		top_line(&layout, &s->list->vm[s->first + i], text);
		put(FIRST_ROW + (int)i, text, s->first + i == selected);
	}
	refresh();
}

/* ---- keys --------------------------------------------------------------------------------------- */

/* ERR: there was none until then, or it is time to end. */
static int wait_key(uint64_t until_us)
{
	while (!ended) {
		struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
		uint64_t now_us = os_now_us();
		int key = getch();

		if (key != ERR || now_us >= until_us)
			return key;
		if (poll(&input, 1,
			 until_us - now_us > 60000000 ? 60000 : (int)((until_us - now_us) / 1000 + 1)) >
			    0 &&
		    input.revents & ~POLLIN)
			ended = 1; /* the terminal has gone */
	}
	return ERR;
}

/* Asks for a line of text. False: the user does not want to. */
static bool prompt(const char *question, char *text, size_t bytes)
{
	char line[TOP_LINE_BYTES];
	size_t used = 0;
	int key;

	text[0] = '\0';
	do {
		move(MESSAGE_ROW, 0);
		clrtoeol();
		snprintf(line, sizeof line, "%s %s_", question, text);
		put(MESSAGE_ROW, line, false);
		refresh();
		key = wait_key(UINT64_MAX);
		if ((key == KEY_BACKSPACE || key == 127 || key == '\b') && used)
			text[--used] = '\0';
		else if (key >= ' ' && key < 127 && used + 1 < bytes)
			text[used++] = (char)key, text[used] = '\0';
	} while (key != ERR && key != ESCAPE && key != '\n' && key != '\r' && key != KEY_ENTER &&
		 key != KEY_RESIZE);
	return (key == '\n' || key == '\r' || key == KEY_ENTER) && used;
}

static void change_delay(struct screen *s)
{
	char question[64], text[16];
	double delay_s;

	snprintf(question, sizeof question, "Change delay from %.1f to:", s->delay_s);
	if (!prompt(question, text, sizeof text))
		return;
	if (cli_parse_real(text, TOP_DELAY_MIN_S, TOP_DELAY_MAX_S, &delay_s))
		s->delay_s = delay_s;
	else
		snprintf(s->message, sizeof s->message, "a delay is from 0.1 to 3600 seconds, not '%s'",
			 text);
}

static void change_scan(struct screen *s)
{
	char question[VMDIR_NAME_BYTES + 64], text[16], name[VMDIR_NAME_BYTES];
	struct vm_view view;
	uint64_t period_us;

	memcpy(name, s->selected, sizeof name);
	snprintf(question, sizeof question, "Scan period of %s (10s, 2m; off):", name);
	if (!name[0] || !prompt(question, text, sizeof text))
		return;
	if (!cli_parse_period_or_off(text, &period_us)) {
		snprintf(s->message, sizeof s->message,
			 "a period is a time from 100ms to 1h, or off; not '%s'", text);
	} else if (vm_view_open(s->list->root, name, &view)) {
		snprintf(s->message, sizeof s->message, "%s is gone", name);
	} else {
		if (!cli_ask_scan(&view, period_us, ANSWER_TIMEOUT_MS, s->message, sizeof s->message))
			snprintf(s->message, sizeof s->message, "%s: %s", name,
				 period_us ? "looked at from now on" : "looked at no more");
		vm_view_close(&view);
	}
}

static void show_help(void)
{
	erase();
	for (size_t i = 0; i < sizeof help / sizeof help[0]; i++)
		put((int)i, help[i], false);
	refresh();
	(void)wait_key(UINT64_MAX);
}

static void order(struct screen *s, enum top_order order)
{
	s->list->order = order;
	top_list_sort(s->list);
}

static void handle(struct screen *s, int key)
{
	size_t row = selected_row(s);

	if (key == ERR)
		return;
	s->message[0] = '\0';
	switch (key) {
	case 'q':
		ended = 1;
		break;
	case 'h':
	case '?':
		show_help();
		break;
	case 'P':
		order(s, TOP_BY_CPU);
		break;
	case 'M':
		order(s, TOP_BY_MEMORY);
		break;
	case 'N':
		order(s, TOP_BY_PID);
		break;
	case 'd':
		change_delay(s);
		break;
	case 's':
		change_scan(s);
		break;
	case ' ':
		s->due_us = 0;
		break;
	case KEY_UP:
		select_row(s, row ? row - 1 : 0);
		break;
	case KEY_DOWN:
		select_row(s, row + 1 < s->list->count ? row + 1 : row);
		break;
	default: /* KEY_RESIZE among them: it is drawn anew anyway */
		break;
	}
}

/* ---- the loop ----------------------------------------------------------------------------------- */

static void loop(struct screen *s, uint64_t rounds)
{
	char why[VMDIR_WHY_BYTES];
	uint64_t round = 0;

	while (!ended) {
		if (os_now_us() >= s->due_us) {
			if (rounds && round++ == rounds)
				return;
			if (top_list_update(s->list, why))
				snprintf(s->message, sizeof s->message, "%s", why);
			s->due_us = os_now_us() + (uint64_t)(s->delay_s * 1e6);
		}
		draw(s);
		handle(s, wait_key(s->due_us));
	}
}

int top_screen(struct top_list *list, double delay_s, uint64_t rounds)
{
	struct screen s = { .list = list, .delay_s = delay_s };
	const char *terminal = getenv("TERM");
	SCREEN *screen;

	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO))
		return cli_fail(CLI_USAGE, "top: this is no terminal; -b prints lines");
	catch_signals(); /* newterm leaves them then */
	screen = newterm(NULL, stdout, stdin);
	if (!screen)
		return cli_fail(CLI_USAGE,
				"top: the terminal '%.40s' is not known (TERM); -b prints lines",
				terminal ? terminal : "");
	cbreak();
	noecho();
	nodelay(stdscr, TRUE);
	keypad(stdscr, TRUE);
	set_escdelay(ESCAPE_MS);
	curs_set(0);
	loop(&s, rounds);
	endwin();
	delscreen(screen);
	return CLI_OK;
}
