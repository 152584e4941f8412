"use strict";
(() => {
  const at = (id) => document.getElementById(id);

  // Theme: system, light, dark. A page opened from a file may have no storage.
  const themes = ["system", "light", "dark"];
  const store = (value) => {
    try {
      return value ? localStorage.setItem("stepkd-theme", value) : localStorage.getItem("stepkd-theme");
    } catch {
      return null;
    }
  };
  const setTheme = (name) => {
    document.documentElement.dataset.theme = name;
    at("theme").textContent = `Theme: ${name}`;
  };
  setTheme(themes.includes(store()) ? store() : "system");
  at("theme").hidden = false;
  at("theme").addEventListener("click", () => {
    const name = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    setTheme(name);
    store(name);
  });

  // Printing opens everything, and closes it again.
  const opened = [];
  addEventListener("beforeprint", () => {
    opened.push(...document.querySelectorAll("details:not([open])"));
    opened.forEach((each) => (each.open = true));
  });
  addEventListener("afterprint", () => opened.splice(0).forEach((each) => (each.open = false)));
  if (!at("list")) return;

  // Solutions. Every text becomes a text node.
  const AT_ONCE = 8; // problems
  const WIDE = 60; // characters of a step that make cards wide
  const LONG = 400; // characters of a prompt that make it smaller
  const BESIDE = 6; // solutions of a problem before "more"
  const problems = JSON.parse(at("data").textContent);
  let filter = "all";
  let count = AT_ONCE;
  let found = [];

  const make = (name, kind, ...content) => {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    element.append(...content.filter((each) => each !== null && each !== undefined && each !== "" && each !== false));
    return element;
  };

  const bar = (score) => {
    const fill = make("span", `fill s${Math.min(4, Math.max(0, Math.floor(score * 5)))}`);
    fill.style.width = `${Math.min(1, Math.max(0, score)) * 100}%`;
    const hasBar = score >= 0 && score <= 1; // others are log-probabilities, advantages, ...
    return make("span", "score", hasBar && make("span", "bar", fill), score.toFixed(2));
  };

  const stepRow = (solution, text, i) => {
    const label = solution.labels[i] ?? null;
    const score = solution.scores[i] ?? null;
    const kind = label === null ? "" : label ? "good" : "bad";
    const mark = make("span", `mark ${kind}`, label === null ? "·" : label ? "✓" : "✗");
    mark.title = label === null ? "no label" : label ? "labelled correct" : "labelled incorrect";
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", mark.title);
    const words = make("span", "text", text);
    const row = make("li", `step ${kind}`, mark, words);
    if (label === false && solution.labels.indexOf(false) === i && solution.labels.length > 1) {
      words.append(make("em", "", "first incorrect step"));
    }
    if (solution.disagrees.includes(i)) {
      words.append(make("em", "odd", `≠ ${solution.scored_by} says ${score >= 0.5 ? "correct" : "incorrect"}`));
    }
    if (score !== null) {
      row.append(bar(score));
      if (label === null) row.classList.add(`s${Math.min(4, Math.max(0, Math.floor(score * 5)))}`);
    }
    return row;
  };

  // The decisions that led to a solution: of every round its candidates, those that were kept marked.
  const candidateRow = (told, [text, score, times, facts]) => {
    const kind = told ? (times ? "kept" : "dropped") : "";
    const mark = make("span", "mark", told ? (times ? "●" : "○") : "·");
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", kind || "candidate");
    const more = [times > 1 ? `kept ${times} times` : "", facts].filter(Boolean).join(", ");
    return make("li", `candidate ${kind}`, mark, make("span", "text", text, more && make("em", "", more)), score !== null && bar(score));
  };
  const traceOf = (solution, isOpen) => {
    if (!solution.trace.length && !solution.untold) return "";
    const rounds = solution.trace.map(({ head, told, candidates }) =>
      make("li", "", make("p", "facts", head), make("ol", "", ...candidates.map((each) => candidateRow(told, each)))));
    const title = make("summary", "", `Decisions, ${solution.trace.length} ${solution.trace.length === 1 ? "round" : "rounds"}`);
    const element = make("details", "trace", title, make("ol", "", ...rounds, solution.untold && make("li", "facts", solution.untold)));
    element.open = isOpen;
    return element;
  };

  // Solutions of a problem that differ in nothing that a card shows are one card, with the runs that gave it.
  const together = (solutions) => {
    const groups = new Map();
    for (const entry of solutions) {
      const [{ run, sample, tags, ...shown }] = entry;
      const key = JSON.stringify(shown);
      groups.set(key, [...(groups.get(key) ?? []), entry]);
    }
    return [...groups.values()].sort((a, b) => b[0][0].tags.length - a[0][0].tags.length);
  };

  const card = (problem, group, all) => {
    const [solution, number] = group[0];
    const runs = new Map();
    for (const [each] of group) runs.set(each.run, [...(runs.get(each.run) ?? []), each.sample]);
    const names = [...runs].map(([run, samples]) => {
      const shown = samples.length > 1 ? `× ${samples.length}` : samples[0];
      return make("span", "runs", run, " ", make("span", "sample", shown));
    });
    const kind = solution.correct === null ? "" : solution.correct ? "good" : "bad";
    const verdict = kind ? make("span", `verdict ${kind}`, solution.correct ? "✓ correct" : "✗ incorrect") : "";
    const facts = [
      solution.correct === false && solution.found !== null ? `answered ${solution.found}` : "",
      solution.tokens === null ? "" : `${solution.tokens} tokens`,
      solution.cut_off ? "cut off" : "",
      ...Object.entries(solution.values).map(([name, value]) =>
        `${name} ${value === null ? "none" : Number.isInteger(value) ? value : Number(value.toPrecision(3))}`),
    ];
    const head = make("h4", "", make("span", "", ...names), verdict);
    const more = solution.more && make("li", "step", make("span", "text", solution.more));
    const steps = make("ol", "", ...solution.steps.map((text, i) => stepRow(solution, text, i)), more);
    const element = make("article", "solution", head, facts.some(Boolean) ? make("p", "facts", facts.filter(Boolean).join(" · ")) : "", steps, traceOf(solution, all));
    element.id = `${problem.anchor}.${number}`;
    element.dataset.numbers = group.map(([, each]) => each).join(" ");
    element.tabIndex = -1;
    return element;
  };

  const block = (problem, solutions, all) => {
    const link = make("a", "", problem.id);
    link.href = `#${problem.anchor}`;
    const answer = problem.answer === null ? null : make("p", "answer", "answer ", make("b", "", problem.answer));
    const isWide = solutions.some(([each]) => each.steps.some((text) => text.length > WIDE));
    const grid = make("div", isWide ? "grid wide" : "grid");
    const prompt = make("pre", problem.prompt.length > LONG ? "prompt long" : "prompt", problem.prompt);
    if (problem.prompt.length > LONG) prompt.tabIndex = 0; // it may scroll
    const element = make("section", "problem", make("h3", "", link), prompt, answer, grid);
    element.id = problem.anchor;
    element.tabIndex = -1;
    const groups = together(solutions);
    const show = (from, to) => grid.append(...groups.slice(from, to).map((group) => card(problem, group, all)));
    show(0, all ? groups.length : BESIDE);
    if (!all && groups.length > BESIDE) {
      const more = make("button", "rest", `${groups.length - BESIDE} more of this problem`);
      more.type = "button";
      more.addEventListener("click", () => {
        more.remove();
        show(BESIDE, groups.length);
        grid.children[BESIDE].focus();
      });
      element.append(more);
    }
    return element;
  };

  const matching = () => {
    const run = at("run").value;
    const text = at("search").value.toLowerCase();
    return problems
      .map((problem) => {
        const head = `${problem.id}\n${problem.prompt}`.toLowerCase();
        const kept = problem.solutions
          .map((solution, i) => [solution, i])
          .filter(
            ([solution]) =>
              (filter === "all" || solution.tags.includes(filter)) &&
              (!run || solution.run === run) &&
              (!text || head.includes(text) || solution.steps.some((step) => step.toLowerCase().includes(text))),
          );
        return [problem, kept];
      })
      .filter(([, kept]) => kept.length);
  };

  const render = (all = false) => {
    found = matching();
    const solutions = found.reduce((sum, [, kept]) => sum + kept.length, 0);
    at("found").textContent = `${solutions} solutions of ${found.length} problems`;
    at("list").replaceChildren(...found.slice(0, all ? found.length : count).map(([problem, kept]) => block(problem, kept, all)));
    at("next").hidden = all || count >= found.length;
    document.querySelectorAll(".filters a").forEach((each) => {
      if (each.hash === `#show-${filter}`) each.setAttribute("aria-current", "true");
      else each.removeAttribute("aria-current");
    });
  };

  const reset = (name) => {
    filter = name;
    count = AT_ONCE;
    render();
  };

  const follow = () => {
    const name = decodeURIComponent(location.hash.slice(1));
    if (name.startsWith("show-")) {
      reset(name.slice(5));
      at("solutions").scrollIntoView();
      return;
    }
    const number = problems.findIndex((each) => name === each.anchor || name.startsWith(`${each.anchor}.`));
    if (number < 0) return;
    at("run").value = at("search").value = "";
    filter = "all";
    count = Math.max(count, number + 1);
    render();
    const block = at(problems[number].anchor);
    const sample = name.slice(problems[number].anchor.length + 1);
    const card = () => sample && block.querySelector(`[data-numbers~="${CSS.escape(sample)}"]`);
    if (sample && !card()) block.querySelector(".rest")?.click();
    const target = card() || block;
    target.scrollIntoView();
    target.focus({ preventScroll: true });
  };

  for (const name of new Set(problems.flatMap((each) => each.solutions.map((solution) => solution.run)))) {
    at("run").append(new Option(name, name));
  }
  at("controls").hidden = false;
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("run").addEventListener("change", () => reset(filter));
  at("search").addEventListener("input", () => reset(filter));
  at("next").addEventListener("click", () => {
    const before = count;
    count += AT_ONCE;
    render();
    at("list").children[before]?.focus();
  });
  addEventListener("hashchange", follow);
  addEventListener("beforeprint", () => render(true));
  addEventListener("afterprint", () => render());
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key !== "j" && event.key !== "k") return;
    const cards = [...document.querySelectorAll(".solution")];
    const here = cards.indexOf(document.activeElement.closest(".solution"));
    const next = cards[here < 0 ? 0 : here + (event.key === "j" ? 1 : -1)];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  });
  render();
  follow();
})();
