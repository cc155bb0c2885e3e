const tip = document.createElement("output")
for (const svg of document.querySelectorAll(".plot > svg")) {
  const axis = name => {
    const [low, high, log] = svg.dataset[name].split(" ").map(Number)
    const value = t => log ? 10 ** (low + (high - low) * t) : low + (high - low) * t
    return t => value(t).toLocaleString("en", {maximumSignificantDigits: 4})
  }
  const x = axis("x"), y = axis("y"), names = JSON.parse(svg.dataset.names), {width, height} = svg.viewBox.baseVal
  const lines = [...svg.querySelectorAll("[data-line]")].map(line => {
    const dots = [...line.querySelectorAll("use")].flatMap(dot => [dot.getAttribute("x"), dot.getAttribute("y")])
    const numbers = (dots.length ? dots : line.firstElementChild.getAttribute("d").match(/[\d.]+/g)).map(Number)
    return [names[line.dataset.line], numbers.flatMap((n, i) => i % 2 ? [] : [[n / width, numbers[i + 1] / height]])]
  })
  svg.onpointerdown = svg.onpointermove = e => {
    const box = svg.getBoundingClientRect(), at = (e.clientX - box.left) / box.width
    const nearest = points => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)
    const values = lines.map(([name, points]) => `${name}: ${y(1 - nearest(points)[1])}`)
    tip.textContent = [`near ${x(at)} ${svg.dataset.over}`, ...values].join("\n")
    tip.className = at < 0.5 ? "right" : "left"
    svg.parentNode.append(tip)
  }
  svg.onpointerleave = e => e.pointerType == "touch" || tip.remove()
}
